"""What a generative model answers right, by type of question: exact match beside what guessing would give."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketvlm.data.exact_match import exact_match, normalise_answer
from pocketvlm.data.scene_questions import CAPTIONS, TYPES, Question, ask_about
from pocketvlm.data.scenes import EMPTY, PictureSet, Scene, SceneTable
from pocketvlm.data.text_metrics import chrf, cider_d
from pocketvlm.distill.vlm.batches import Composer, drawn_scenes
from pocketvlm.students.vlm.model import Seen, Vlm

_CAPTION_TOKENS, _TOKENS = 64, 16
# the stream of test scenes is no stream of training, whatever seed that one has
SCENES_SEED = 1_000_003


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about scene number `scene`, and what the model answered."""

    scene: int
    question: Question
    answer: str

    @property
    def right(self) -> bool:
        return exact_match(self.answer, self.question.answer)


def drawn_questions(pictures: PictureSet, *, scenes: int, questions: int = 4) -> list[tuple[Scene, list[Question]]]:
    """The first `scenes` scenes of the test stream, the same for every model, with up to `questions` about each."""
    return [ask_about(pictures, SCENES_SEED, index, questions) for index in range(scenes)]


def longest_answer(question: Question) -> int:
    """Tokens that an answer may have."""
    return _CAPTION_TOKENS if question.type in CAPTIONS else _TOKENS


def answer_scenes(
    model: Vlm,
    pictures: PictureSet,
    table: SceneTable | None,
    *,
    scenes: int,
    questions: int = 4,
    batch: int = 256,
    seen: Seen | None = None,
    captions: bool = True,
) -> tuple[list[Scene], list[Asked]]:
    """Greedy answers to the first `scenes` scenes of the test stream, `questions` about each, in that order.

    The same scenes and questions for every model. table: of these pictures; variant 0 is shown.
    seen: what the model's tower saw of these scenes (`see_scenes`), instead of a table. captions: whether they are
    asked for, the longest answers by far.
    """
    device = model.device
    composer = None if table is None else Composer(table, device)
    drawn = drawn_questions(pictures, scenes=scenes, questions=questions)
    asked = [(index, question) for index, (_, found) in enumerate(drawn) for question in found]
    asked = [pair for pair in asked if captions or pair[1].type not in CAPTIONS]
    # alike lengths together, and the order of composed scenes
    order = sorted(
        range(len(asked)), key=lambda i: (asked[i][1].type in CAPTIONS, drawn[asked[i][0]][0].grid, asked[i][0], i)
    )
    said: dict[int, str] = {}
    for start in range(0, len(order), batch):
        part = sorted(order[start : start + batch], key=lambda i: (drawn[asked[i][0]][0].grid, i))
        shown: Tensor | Seen
        if seen is not None:
            shown = seen.rows([asked[i][0] for i in part])
        else:
            assert composer is not None
            shown = composer(drawn_scenes([drawn[asked[i][0]][0] for i in part], len(pictures), 1, None).to(device))
        longest = max(longest_answer(asked[i][1]) for i in part)
        answers = model.generate(shown, [asked[i][1].text for i in part], max_new_tokens=longest)
        said |= dict(zip(part, answers))
    return [scene for scene, _ in drawn], [Asked(*asked[i], said[i]) for i in range(len(asked))]


@torch.no_grad()
def see_scenes(
    model: Vlm, pictures: PictureSet, table: SceneTable, *, scenes: int, scored: Sequence[str] = (), batch: int = 32
) -> Seen:
    """What the model's tower sees of the first `scenes` scenes of the test stream; scored: `Vlm.look`'s scores."""
    device = model.device
    composer = Composer(table, device)
    # one question draws the same scene as any number
    drawn = [ask_about(pictures, SCENES_SEED, index, 1)[0] for index in range(scenes)]
    order = sorted(range(scenes), key=lambda index: (drawn[index].grid, index))
    parts = []
    for start in range(0, scenes, batch):
        part = [drawn[index] for index in order[start : start + batch]]
        parts.append(model.look(composer(drawn_scenes(part, len(pictures), 1, None).to(device)), scored))
    whole = Seen(
        torch.cat([part.features for part in parts]),
        {name: torch.cat([part.scores[name] for part in parts]) for name in scored},
    )
    return whole.rows([order.index(index) for index in range(scenes)])


def scores(pictures: PictureSet, scenes: list[Scene], asked: list[Asked]) -> dict[str, Any]:
    """Accuracy by type and what else is told of answers, all shares 0..1.

    "types": for each type n, accuracy, majority (the share of the most common right answer: what one constant answer
    gives) and for yes/no questions yes (how often the model says so; about half would be right).
    "accuracy": over all questions but captions. "mean": of the types' accuracies, captions left out.
    "captions": of scene captions, the share of pictures named at their place (recall), of said entries that are true
    (precision), and of said names that are nowhere in the scene (hallucinated); of captions of single pictures and of
    scenes together, chrF (0..100) and CIDEr-D (0..10; `data.text_metrics`, after `normalise_answer`; how rare a word is
    comes from the right captions of these scenes).
    """
    types: dict[str, Any] = {}
    for name in TYPES:
        rows = [row for row in asked if row.question.type == name]
        if not rows:
            continue
        common = Counter(normalise_answer(row.question.answer) for row in rows)
        types[name] = {
            "n": len(rows),
            "accuracy": sum(row.right for row in rows) / len(rows),
            "majority": common.most_common(1)[0][1] / len(rows),
        }
        if set(common) <= {"yes", "no"}:
            types[name]["yes"] = sum(normalise_answer(row.answer) == "yes" for row in rows) / len(rows)
    short = [row for row in asked if row.question.type not in CAPTIONS]
    counted = [value["accuracy"] for name, value in types.items() if name not in CAPTIONS]
    return {
        "questions": len(asked),
        "accuracy": sum(row.right for row in short) / max(len(short), 1),
        "mean": sum(counted) / max(len(counted), 1),
        "types": types,
        "captions": _captions(pictures, scenes, asked),
    }


def _captions(pictures: PictureSet, scenes: list[Scene], asked: list[Asked]) -> dict[str, float]:
    """Scene captions are "place: name; place: name", compared entry by entry."""
    shown = said = true = nowhere = 0
    for row in asked:
        if row.question.type != "scene-caption":
            continue
        expected, found = (_entries(text) for text in (row.question.answer, row.answer))
        names = {
            normalise_answer(pictures.pictures[number].name) for number in scenes[row.scene].cells if number != EMPTY
        }
        shown, said = shown + len(expected), said + len(found)
        true += len(expected & found)
        nowhere += sum(name not in names for _, name in found)
    written = [row for row in asked if row.question.type in CAPTIONS]
    answers = [normalise_answer(row.answer) for row in written]
    wanted = [normalise_answer(row.question.answer) for row in written]
    return {
        "recall": true / max(shown, 1),
        "precision": true / max(said, 1),
        "hallucinated": nowhere / max(said, 1),
        "chrf": chrf(answers, wanted) if written else 0.0,
        "cider_d": cider_d(answers, [[text] for text in wanted]) if written else 0.0,
    }


def _entries(text: str) -> set[tuple[str, str]]:
    parts = (part.partition(":") for part in text.split(";"))
    return {(normalise_answer(place), normalise_answer(name)) for place, _, name in parts if name.strip()}


def table(found: dict[str, dict[str, Any]], line: Callable[[str], None] = print) -> None:
    """Print scores of several sets of pictures beside each other: accuracy, and the majority's in brackets."""
    line(f"{'type':<14}" + "".join(f"{name:>24}" for name in found))
    for name in TYPES:
        cells = []
        for values in found.values():
            row = values["types"].get(name)
            cells.append("–" if row is None else f"{row['accuracy']:.3f} ({row['majority']:.3f}) {row['n']:>5}")
        line(f"{name:<14}" + "".join(f"{cell:>24}" for cell in cells))
    line(f"{'all questions':<14}" + "".join(f"{values['accuracy']:>24.3f}" for values in found.values()))
    line(f"{'mean of types':<14}" + "".join(f"{values['mean']:>24.3f}" for values in found.values()))


def evaluate_vlm(
    model: Vlm, pictures: PictureSet, *, scenes: int, questions: int = 4, batch: int = 256
) -> dict[str, Any]:
    """`scores` of a model on scenes of these pictures."""
    side = model.config.vision.size
    made = SceneTable.build(pictures, side)
    with torch.no_grad():
        return scores(pictures, *answer_scenes(model, pictures, made, scenes=scenes, questions=questions, batch=batch))
