"""The student that a run starts from: built new, filled from a saved one, or a saved one as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pocketvlm.data.source import DataSource
from pocketvlm.distill.recipe import AS_INIT, Recipe
from pocketvlm.distill.shares import student_dim
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import (
    Classes,
    Student,
    build_student,
    check_widths,
    inherit_tokenizer,
    load_config,
    load_student,
    train_tokenizer,
)
from pocketvlm.teachers.ensemble import Ensemble

DEFAULT_DIM = 256
# tokenizer.source -> what makes it of texts, with at most so many pieces
TOKENIZER_MAKERS: dict[str, Callable[[Sequence[str], int], bytes]] = {
    "texts": train_tokenizer,
    "minilm-l6": inherit_tokenizer,
}


def start_student(
    recipe: Recipe,
    source: DataSource,
    texts: Sequence[str],
    english: Sequence[str],
    teacher: Ensemble | None,
    classes: Classes | None = None,
    known: bytes | None = None,
) -> Student:
    """The student that the recipe starts from. known: its tokenizer, where that was made before."""
    section = recipe.student
    if section.name == AS_INIT:
        return _as_saved(recipe, teacher, classes)
    origin, size, _ = tokenizer_asked(recipe)
    tokenizer: bytes | Path
    if known is not None:
        tokenizer = known
    elif origin in TOKENIZER_MAKERS:
        if not texts:
            raise UsageError(
                f"{source.name} has no captions to make a tokenizer from; add data.words (name, size), or set "
                "tokenizer.source to a tokenizer.json"
            )
        tokenizer = TOKENIZER_MAKERS[origin](english, size)
    else:
        tokenizer = Path(origin)
    width = section.embed_dim or (DEFAULT_DIM if teacher is None else student_dim(teacher))
    student = build_student(
        section.name,
        embed_dim=width,
        tokenizer_json=tokenizer,
        seed=recipe.train.seed,
        space_id=_shared_space(teacher, width),
        overrides=section.overrides,
        classes=classes,
    )
    if recipe.tokenizer.added_pieces:
        from pocketvlm.students.languages import add_languages

        pairs = [(text, other) for text, other in zip(texts, english) if text != other]
        student = add_languages(student, pairs, recipe.tokenizer.added_pieces, seed=recipe.train.seed)
    if section.init:
        _start_from(student, Path(section.init), section.init_parts)
    return student


def _as_saved(recipe: Recipe, teacher: Ensemble | None, classes: Classes | None) -> Student:
    """The student of `student.init` itself, its tokenizer included, in the teacher's space."""
    student = load_student(str(recipe.student.init)).train()
    saved = None if student.heads is None else student.heads.classes.labels
    if classes is not None and saved != classes.labels:
        raise UsageError(
            f"student.init {recipe.student.init} has {'no classes' if saved is None else f'the classes {list(saved)}'} "
            f"and the task asks for {list(classes.labels)}, so its heads would name pictures wrongly; start from a "
            "student of the same task, or name the student to build"
        )
    if teacher is not None and len(teacher.members) == 1:
        check_widths(student.embed_dim, teacher.dim, student=str(recipe.student.init), teacher=teacher.name)
    student.space_id = _shared_space(teacher, student.embed_dim)
    return student


def _shared_space(teacher: Ensemble | None, width: int) -> str | None:
    return teacher.space_id if teacher is not None and teacher.pictures and teacher.dim == width else None


def _start_from(student: Student, folder: Path, parts: Sequence[str]) -> None:
    """Copy weights of a saved student, all of them or those under the prefixes `parts`."""
    other = load_student(folder)
    wanted = {
        name: value
        for name, value in other.state_dict().items()
        if not parts or any(name == part or name.startswith(part + ".") for part in parts)
    }
    if any(name.startswith("text_tower.") for name in wanted) and other.tokenizer_json != student.tokenizer_json:
        raise UsageError(
            f"student.init {folder} reads its text through another tokenizer, so its token embeddings would mean other "
            f"words; set tokenizer.source to {folder / 'tokenizer.json'}"
        )
    own = student.state_dict()
    odd = [name for name, value in wanted.items() if name not in own or own[name].shape != value.shape]
    if odd or not wanted:
        raise UsageError(
            f"student.init {folder} does not fit the student of this recipe (first at {odd[0] if odd else parts}); use "
            "the same student, overrides and embedding width, or name fitting student.init_parts"
        )
    student.load_state_dict({**own, **wanted})


def tokenizer_asked(recipe: Recipe) -> tuple[str, int, int]:
    """Where a recipe's tokenizer comes from, how many pieces it has, and how many are added."""
    if recipe.student.name == AS_INIT:
        return str(recipe.student.init), 0, 0
    config = load_config(recipe.student.name, recipe.student.overrides)
    asked = recipe.tokenizer
    return asked.source, asked.vocab_size or config.text.vocab_size, asked.added_pieces
