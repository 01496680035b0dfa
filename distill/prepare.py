"""Make everything ready that a run needs before its first step: data, texts, tokenizer, teacher outputs, student."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketvlm.data import cache_dir, open_data
from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.hard_negatives import with_hard_negatives
from pocketvlm.data.sample import Sample
from pocketvlm.data.source import DataSource, unfit
from pocketvlm.distill.answers import answers_on_disk, joined_answers, slug, teacher_answers
from pocketvlm.distill.axes import TurnedCache, axes_of, turned
from pocketvlm.distill.batches import Pictures
from pocketvlm.distill.evaluate import Embedded, Questions, questions_of
from pocketvlm.distill.labels import TaskLabels, task_classes, task_labels
from pocketvlm.distill.made_cache import MadeCaches, check_logits, check_precomputed
from pocketvlm.distill.masking import asked_masking
from pocketvlm.distill.plan_table import size
from pocketvlm.distill.progress import Reporter, Stages
from pocketvlm.distill.questions import only_labels
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.regions import check_dense
from pocketvlm.distill.shares import check_shares
from pocketvlm.distill.start import start_student, tokenizer_asked
from pocketvlm.distill.student_teacher import open_teacher, open_teachers
from pocketvlm.distill.taps import asked_taps, tap_widths
from pocketvlm.distill.text_pool import asked_logits, english_of, text_pool, with_parallel
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError, counted
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.students import Student
from pocketvlm.teachers.base import Teacher, TextTeacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_build import build_cache
from pocketvlm.teachers.cache_format import digest_names
from pocketvlm.teachers.ensemble import Ensemble, JoinedCache, joined
from pocketvlm.teachers.tokens import token_bytes, token_shape
from pocketvlm.teachers.top_logits import TopLogits, logit_bytes


@dataclass
class Prepared:
    """samples: those that train, every picture readable. texts: the pool of the text-only batch. english: what the
    teacher reads for each of `texts`: the text itself, or its English (`data.parallel`).

    source, held_out: training and evaluation data, without the captions that the student could not read whole.
    images / words: the teachers' caches of pictures with captions, and of `texts`; None without a teacher.
    digest: over everything that decides the run's arithmetic besides the recipe; a resumed run must match it.
    pictures_digest: over uids and sources of the pictures. report: where progress is told.
    task: classes and labels of a recipe with a task. bank: texts of `teacher.logits`, in order.
    stream: of a recipe with `data.stream` (`stream_feed`), of which `source` and `samples` are only a look at the
    beginning.
    memo: what runs over the same inputs share (token ids, outputs below the cut), filled by the first that needs it.
    """

    recipe: Recipe
    source: DataSource
    held_out: DataSource | None
    samples: list[Sample]
    texts: list[str]
    english: list[str]
    tokenizer: Tokenizer
    student: Student
    pictures: Pictures
    teacher: Ensemble | None
    images: TeacherCache | JoinedCache | None
    words: TeacherCache | JoinedCache | None
    questions: Questions | None
    teacher_answers: Embedded | None
    digest: str
    pictures_digest: str
    report: Reporter
    task: TaskLabels | None = None
    bank: tuple[str, ...] = ()
    stream: Any = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def with_recipe(self, recipe: Recipe, student: Student | None = None) -> Prepared:
        """The same inputs for another run: other objectives, schedule, seed or start, or the same without its teacher.

        student: the one that is trained, in place of the one that `recipe` starts from; it is not copied.

        Raises:
            UsageError: `recipe` reads what was not prepared (data, views, teacher, texts, other preprocessing, another
                tokenizer or other questions).
        """
        own, other = self.recipe, recipe
        differ = [part for part in ("data", "views", "task") if getattr(own, part) != getattr(other, part)]
        if other.teacher is not None:
            kept = ("spec", "cache", "cache_dtype", "token_grid", "logits")
            if own.teacher is None or any(getattr(own.teacher, k) != getattr(other.teacher, k) for k in kept):
                differ.append("teacher")
            elif (other.teacher.axes == "principal") != isinstance(self.images, TurnedCache):
                differ.append("axes of the teacher")
            elif wants_texts(other) and self.words is None and self.texts:
                differ.append("texts of the teacher")
        if student is None and tokenizer_asked(own) != tokenizer_asked(other):
            differ.append("tokenizer")
        if student is None and not differ:
            classes = self.task.classes if self.task is not None else None
            taught = self.teacher if other.teacher is not None else None
            # made from texts of which those past the context are gone: made again it would be another one
            known = None if other.tokenizer.added_pieces else self.tokenizer_json
            student = start_student(other, self.source, self.texts, self.english, taught, classes, known)
            check_dense(other, student)
        if student is not None:
            differ += [
                part for part in ("image_spec", "text_spec") if getattr(student, part) != getattr(self.student, part)
            ]
            if student.tokenizer_json != self.tokenizer_json:
                differ.append("tokenizer")
        if self.questions is not None and _asked(own) != _asked(other):
            differ.append("evaluation")
        if differ or student is None:
            raise UsageError(
                f"recipe {other.name!r} has other inputs ({', '.join(differ)}) than those that were prepared for "
                f"{own.name!r}, so it would be trained on the wrong ones; prepare it by itself"
            )
        check_captions(other, self.source)
        alone = other.teacher is None
        if not alone and self.teacher is not None:
            check_shares(other, self.teacher)
        return dataclasses.replace(
            self,
            recipe=other,
            student=student,
            teacher=None if alone else self.teacher,
            images=None if alone else self.images,
            words=self.words if not alone and wants_texts(other) else None,
            teacher_answers=None if alone else self.teacher_answers,
            bank=() if alone else self.bank,
            digest=digest_of(
                self.samples,
                self.texts,
                self.english,
                student,
                None if alone else self.teacher,
                () if alone else self.bank,
            ),
        )

    def read(self, captions: Sequence[str]) -> list[str]:
        """What the teacher reads for these captions: with `data.parallel` their English."""
        if "read" not in self.memo:
            self.memo["read"] = english_of(self.recipe, self.samples)
        known: dict[str, str] = self.memo["read"]
        return [known.get(caption, caption) for caption in captions]

    @property
    def tokenizer_json(self) -> bytes:
        """Of the tokenizer that `texts` and captions were checked with."""
        return self.student.tokenizer_json

    @property
    def licences(self) -> tuple[tuple[str, str, str], ...]:
        """(what, licence, attribution) of data, teacher, initial weights and word lists, each once."""
        words = self.recipe.data.words
        rows = [*self.source.licences, *(self.teacher.licences if self.teacher else ()), *self.student.licences]
        if words is not None:
            from pocketvlm.data.wordlist import word_list_licences

            rows += word_list_licences(words.name)
        if self.recipe.data.parallel is not None:
            from pocketvlm.data.parallel import parallel_licences

            rows += parallel_licences(self.recipe.data.parallel.sources)
        return tuple(dict.fromkeys((what, licence, by) for what, licence, by in rows))


def prepare(
    recipe: Recipe,
    report: Reporter,
    *,
    source: DataSource | None = None,
    opener: Callable[..., Teacher] | None = None,
) -> Prepared:
    """Open, build or find in the cache all that `recipe` names.

    source: training data in place of `data.train`. opener: opens a teacher's spec in place of `open_teacher`.

    Raises:
        UsageError: parts that do not fit each other (see the checks below), an empty data set.
        BadSampleError: an unreadable sample under `on_bad_sample: refuse`.
    """
    if recipe.data.stream is not None:
        from pocketvlm.distill.stream_feed import prepare_stream

        return prepare_stream(recipe, report)
    with Stages(report, "data") as progress:
        bad = recipe.data.on_bad_sample
        source = source or open_data(recipe.data.train, on_bad_sample=bad, progress=progress)
        held_out = open_data(recipe.data.eval, on_bad_sample=bad, progress=progress) if recipe.data.eval else None
    source = source.weighed(recipe.data.caption_weights)
    check_captions(recipe, source)
    classes = task_classes(recipe, source.samples, source.name, source.templates or recipe.eval.templates)
    if classes is not None and held_out is not None:
        held_out = only_labels(held_out)
    texts = text_pool(recipe, source, held_out, classes)
    english = [*texts]
    if recipe.data.parallel is not None:
        texts, english = with_parallel(recipe, source, held_out, texts)
    logits = asked_logits(recipe)
    teachers, teacher = open_teachers(recipe, report, opener or open_teacher)
    if teacher is not None:
        check_shares(recipe, teacher)
    student = start_student(recipe, source, texts, english, teacher, classes)
    # before the teacher works for minutes on what the student cannot be compared with
    taps = asked_taps(recipe)
    tap_widths(student, taps, recipe.train.cut_after_block)
    asked_masking(recipe)
    check_dense(recipe, student)
    tokenizer = Tokenizer(student.tokenizer_json, student.text_spec)
    policy = AugmentPolicy.from_dict(recipe.views.policy)
    whole, source = source, source.within_context(tokenizer)
    gone = set(whole.captions()) - set(source.captions())
    if recipe.data.parallel is not None:
        # a half-read text would be taught the meaning of the whole
        gone |= unfit(tokenizer, list(dict.fromkeys(texts))).keys()
    kept = [place for place, text in enumerate(texts) if text not in gone]
    texts, english = [texts[place] for place in kept], [english[place] for place in kept]
    held_out, questions = questions_for(recipe, held_out, tokenizer)
    samples, pictures = _readable(recipe, source, student, policy, report)
    for what, data in (("training", source), ("evaluation", held_out)):
        if data is not None and data.report.counts:
            why_not = ", ".join(f"{count} x {reason}" for reason, count in sorted(data.report.counts.items()))
            report.line(f"left out of the {what} data {data.name}: {why_not}")
    check_captions(recipe, source)
    section = recipe.task
    task = task_labels(classes, samples, section.validation) if classes is not None and section is not None else None
    outputs = [
        teacher_outputs(recipe, one, samples, english, questions, policy, report, task, logits) for one in teachers
    ]
    bank = logits.texts if logits is not None else ()
    images, words, answers = together(teacher, outputs)
    found = Prepared(
        recipe=recipe,
        source=source,
        held_out=held_out,
        samples=samples,
        texts=texts,
        english=english,
        tokenizer=tokenizer,
        student=student,
        pictures=pictures,
        teacher=teacher,
        images=images,
        words=words,
        questions=questions,
        teacher_answers=answers,
        digest=digest_of(samples, texts, english, student, teacher, bank),
        pictures_digest=pictures.digest(),
        report=report,
        task=task,
        bank=bank,
    )
    principal = recipe.teacher is not None and recipe.teacher.axes == "principal"
    return turned(found, axes_of(found)) if principal else found


def questions_for(
    recipe: Recipe, held_out: DataSource | None, tokenizer: Tokenizer
) -> tuple[DataSource | None, Questions | None]:
    """The evaluation data without what the student could not read whole, and what is asked of it; None without any."""
    if held_out is None:
        return None, None
    if {"hard_negatives", "all"} & set(recipe.eval.metrics):
        held_out = with_hard_negatives(held_out)
    held_out = held_out.within_context(tokenizer)
    return held_out, questions_of(held_out, templates=recipe.eval.templates)


def digest_of(
    samples: Sequence[Sample],
    texts: Sequence[str],
    english: Sequence[str],
    student: Student,
    teacher: Any,
    bank: Sequence[str] = (),
) -> str:
    facts = {
        "samples": digest_names([f"{s.uid} {_drawn(s)}" for s in samples]),
        "texts": digest_names(texts),
        "tokenizer": hashlib.sha256(student.tokenizer_json).hexdigest(),
        "teacher": teacher.fingerprint if teacher else None,
        # they say what may be cut afterwards and change no step
        "student": student.config.model_dump(mode="json", exclude={"dims", "exits"}),
    }
    if student.heads is not None:
        facts["classes"] = [list(student.heads.classes.labels), [sample.label for sample in samples]]
    if bank:
        facts["bank"] = digest_names(bank)
    if english != texts:
        facts["english"] = digest_names(english)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _drawn(sample: Sample) -> list[Any]:
    """What decides which caption a step draws: texts, and their weights where these differ."""
    alike = len({caption.weight for caption in sample.captions}) < 2
    return [caption.text if alike else (caption.text, caption.weight) for caption in sample.captions]


def _asked(recipe: Recipe) -> tuple[Any, ...]:
    """What of a recipe decides the questions of its evaluation, but for the data."""
    return recipe.eval.templates, "hard_negatives" in recipe.eval.metrics


def check_captions(recipe: Recipe, source: DataSource) -> None:
    from pocketvlm.distill.objectives import objective_needs

    captioned = sum(bool(sample.captions) for sample in source.samples)
    asking = [s.name for s in recipe.objectives if s.batch == "pairs" and objective_needs(s.name, s.options).captions]
    if asking and captioned == 0:
        gone = ", ".join(f"{count} x {reason}" for reason, count in sorted(source.report.counts.items()))
        raise UsageError(
            f"{', '.join(asking)} learn from picture-caption pairs and none of the {len(source)} pictures of "
            f"{source.name} has a caption{f' (left out: {gone})' if gone else ''}; add captions, or use objectives "
            "that need none (docs/recipes.md lists them)"
        )
    if len(asking) == len(recipe.objectives) and captioned == 1:
        raise UsageError(
            f"only one picture of {source.name} has a caption, so {', '.join(asking)} would have nothing to tell it "
            "from and a loss of 0; give at least two captioned pictures"
        )


def _readable(
    recipe: Recipe, source: DataSource, student: Student, policy: AugmentPolicy, report: Reporter
) -> tuple[list[Sample], Pictures]:
    """Samples whose pictures decode; the rest is counted in `source.report`."""
    samples, data, bad = list(source.samples), recipe.data, []

    def pictures_of(kept: list[Sample]) -> Pictures:
        budget = int(data.ram_gb * 2**30)
        return Pictures(
            kept, student.image_spec, policy=policy, seed=recipe.views.seed, source_px=data.source_px, budget=budget
        )

    pictures = pictures_of(samples)
    with report.stage("reading pictures", len(samples)) as update:
        for index, sample in enumerate(samples):
            try:
                pictures.source(index)
            except BadSampleError as error:
                source.report.add_error(error, sample.uid)
                bad.append(index)
            update(index + 1, "")
    if bad:
        gone = set(bad)
        samples = [sample for index, sample in enumerate(samples) if index not in gone]
        source.report.refuse_empty(source.name, len(samples))
        pictures = pictures_of(samples)
    return samples, pictures


def teacher_outputs(
    recipe: Recipe,
    teacher: Any,
    samples: Sequence[Sample],
    texts: Sequence[str],
    questions: Questions | None,
    policy: AugmentPolicy,
    report: Reporter,
    task: TaskLabels | None = None,
    logits: TopLogits | None = None,
) -> tuple[TeacherCache | None, TeacherCache | None, Embedded | None]:
    """One teacher's caches of pictures with captions and of `texts`, and its answers to the evaluation."""
    assert recipe.teacher is not None, "only a run with a teacher asks for its outputs"
    section, views, blind = recipe.teacher, recipe.views.count, isinstance(teacher, TextTeacher)
    prompts = [text for row in task.prompts for text in row] if task is not None else []
    prompts += logits.texts if logits is not None else ()
    known, texts = english_of(recipe, samples), list(dict.fromkeys(texts))
    # prompts first: runs that differ in which pictures are labelled then share one cache
    captions = list(dict.fromkeys([*prompts, *(known.get(c.text, c.text) for s in samples for c in s.captions)]))
    made, dtype = MadeCaches.find(section.cache), section.cache_dtype or "float32"
    root = Path(section.cache) if section.cache and made is None else cache_dir() / "teacher"

    shown = f"{counted(len(samples), 'picture')} x {counted(views, 'view')}"
    tokens: dict[str, Any] = {}
    if (
        samples
        and asked_taps(recipe).teacher
        and not blind
        and not isinstance(getattr(teacher, "cache", None), TeacherCache)
    ):
        grid, width = token_shape(teacher, section.token_grid)
        cost = token_bytes(len(samples), views, grid, width, dtype)
        if made is None:
            report.line(
                f"teacher: token maps of {shown}, {grid} x {grid} places of {width} "
                f"numbers in {dtype}: {size(cost)} in {root}"
            )
        # a shard is held in memory while it is made
        tokens = {"token_grid": grid, "shard_size": max(1, min(512, (1 << 28) * len(samples) // max(1, cost)))}

    if logits is not None and made is None and not isinstance(getattr(teacher, "cache", None), TeacherCache):
        cost = len(samples) * views * logit_bytes(logits.top, len(logits.texts))
        report.line(
            f"teacher: the {logits.top} largest logits over {len(logits.texts):,} texts of {shown}: {size(cost)} in "
            f"{root}"
        )

    def cached(part: str, pictures: Sequence[Sample], words: Sequence[str], **how: Any) -> TeacherCache:
        facts = [part, teacher.fingerprint, dtype, section.batch_size, str(how), policy.digest()]
        key = digest_names([*facts, "|", *(s.uid for s in pictures), "|", *words])
        folder = root / f"{slug(teacher.name)}-{part}-{key[:16]}"
        found = (folder / "cache.json").exists()
        with Stages(report, f"teacher: {part}") as progress:
            cache = build_cache(
                teacher, pictures, words, folder, dtype=dtype, batch_size=section.batch_size,
                progress=progress, **how,
            )  # fmt: skip
        if found and (changed := cache.changed(pictures)):
            raise IntegrityError(
                f"{len(changed)} pictures (first {changed[0]!r}) are not the ones that the teacher cache {folder} was "
                "made from, so the student would be taught about other pictures; delete that folder and run again"
            )
        return cache

    if isinstance(ready := getattr(teacher, "cache", None), TeacherCache):
        # precomputed embeddings are a cache already; there is no model that could fill another one
        images: TeacherCache | None = ready
        words_cache: TeacherCache | None = ready
        check_logits(ready, logits)
        check_precomputed(recipe, ready, samples, [*captions, *(texts if wants_texts(recipe) else ())])
    elif made is not None:
        asked = [*captions, *(texts if wants_texts(recipe) else ())]
        kept = made.of(recipe, teacher, () if blind else samples, asked, policy, tokens.get("token_grid", 0), logits)
        images = kept if captions or not blind or kept.data_shards else None
        words_cache = kept if wants_texts(recipe) and texts else None
        report.line(f"teacher: outputs of {teacher.name} from {kept.folder}")
    elif blind or not samples:  # a stream's pictures come later
        images = cached("captions", (), captions) if captions else None
        words_cache = cached("texts", (), texts) if wants_texts(recipe) and texts else None
    else:
        images = cached(
            "views",
            samples,
            captions,
            views=views,
            policy=policy if views > 1 else None,
            seed=recipe.views.seed,
            **tokens,
            **({} if logits is None else {"logits": logits}),
        )
        words_cache = cached("texts", (), texts) if wants_texts(recipe) and texts else None
    answers = None
    if questions is not None and not blind:
        if isinstance(ready, TeacherCache):
            answers = answers_on_disk(ready, questions, report)
        else:
            answers = teacher_answers(teacher, questions, root, batch_size=recipe.eval.batch_size, say=report.line)
    return images, words_cache, answers


def together(
    teacher: Ensemble | None, found: list[tuple[TeacherCache | None, TeacherCache | None, Embedded | None]]
) -> tuple[TeacherCache | JoinedCache | None, TeacherCache | JoinedCache | None, Embedded | None]:
    """The outputs of all teachers, side by side."""
    if teacher is None:
        return None, None, None
    images, words, answers = zip(*found)
    asked = [answers[place] for place in teacher.joint]
    return joined(teacher.members, images), joined(teacher.members, words), joined_answers(asked, teacher)


def wants_texts(recipe: Recipe) -> bool:
    train, student = recipe.train, recipe.student
    return bool(train.text_batch or isinstance(train.bank, int) or student.fit_text_projection is not None)
