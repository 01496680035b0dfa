"""A student on a user's own pictures: with written conversations, recorded answers, or a teacher that is asked here.

    data                  teacher              what is learnt
    talks.jsonl           none                 the conversations' answers
    talks.jsonl           vlm:…, hf-vlm:…      what the teacher answers to each of their questions, or with
                                               `own_answers` theirs, and how probable it finds them
    any pictures, asked   vlm:…, hf-vlm:…      what it answers to the same questions about each picture
    any pictures          recorded:FILE        the answers in the file, joined by id

What a teacher says here is written down as recorded answers (`ANSWERS`) and read like them, so that it answers once
for any number of students. Nothing of it is compared but its answers and, with `aligned`, its probabilities of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pocketvlm.data.conversations import MARKER, read_conversations
from pocketvlm.data.opening import drop_undecodable, open_data
from pocketvlm.data.readers.manifest import is_unicode
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Sample
from pocketvlm.data.source import DataSource
from pocketvlm.distill.checkpoint import write_text_atomically
from pocketvlm.distill.vlm.across import aligned as aligned_loss
from pocketvlm.distill.vlm.across import heard_batches, lesson_pixels
from pocketvlm.distill.vlm.batches import batches
from pocketvlm.distill.vlm.conversations import ConversationStream, pixels_of
from pocketvlm.distill.vlm.kept_teacher import KeptTeacher
from pocketvlm.distill.vlm.own_answers import heard_samples, single_turns, write_answers
from pocketvlm.distill.vlm.recipe import StageSection, VlmRecipe
from pocketvlm.distill.vlm.run import STUDENT, check_student, hf_options, make_room, student_of
from pocketvlm.distill.vlm.stages import HISTORY
from pocketvlm.distill.vlm.teachers import BuiltinVlm, RecordedTeacher, open_vlm_teacher
from pocketvlm.distill.vlm.train import Checkpoints, VlmTraining, next_token_loss, train_vlm
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.students.vlm import Vlm, VlmConfig, save_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import STUDENT as CLIP_STUDENT
from pocketvlm.teachers.device import describe_device, full_float32, pick_device
from pocketvlm.teachers.files import sha256_file
from pocketvlm.teachers.vlm import VlmTeacher, recorded_answers

ANSWERS, FACTS, BEGUN = "answers.jsonl", "run.json", "begun.json"
_RECORDED = (("answers that another model gave", "see the terms of that model", ""),)


def distill_own(
    data: str,
    teacher: str | Path | None,
    student: str,
    recipe: VlmRecipe,
    out: Path,
    *,
    ask: Sequence[str] = (),
    aligned: float = 0.0,
    own_answers: bool = False,
    max_new_tokens: int = 64,
    words: str | Path | None = None,
    vision: str | None = None,
    tokenizer: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    on_bad_sample: str = "skip",
    limit: int | None = None,
    workers: int = 0,
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a student on a user's data.

    Args:
        data: conversations (`read_conversations`), or with `ask` or a recorded teacher any data set (`open_data`).
        teacher: as `open_vlm_teacher`, or None. student, words, vision, options, out: as `run.distill_vlm`; `out`
            gets `student/`, `history.json`, `run.json` and what a teacher answered here.
        recipe: of its stages steps, batch, rates and whether vision is trained along; the rest is about scenes.
        ask: questions about every picture. aligned: weight of the divergence of aligned spans from the teacher.
        own_answers: the teacher reads the conversations' answers with `aligned`, and answers nothing itself.
        max_new_tokens: of its answers at most; longer ones are cut, and learnt so.
        tokenizer: file of a new student's; None takes the teacher's, or trains one on the texts.
        limit: so many pictures or conversations only. workers: processes that read pictures. resume: go on with the run
            in `out`, begun with these very arguments; what a teacher wrote down is read, and not asked again.

    Returns what run.json holds.

    Raises:
        IntegrityError: the run to be resumed was begun otherwise. UsageError: options that do not go together, a recipe
            with terms that are not compared here, no usable sample, or as the readers. BadSampleError: a bad one, where
            `on_bad_sample` is "refuse".
    """
    check_student(student, tokenizer, vision, words)
    trainings = [_training(stage, recipe) for stage in recipe.stages]
    where, half = pick_device(device), recipe.optim.bfloat16
    opened = None if teacher is None else open_vlm_teacher(teacher, device=where, **hf_options(teacher, half, options))
    if isinstance(opened, KeptTeacher):
        raise UsageError(
            f"what teacher {str(teacher)!r} said is about the built-in pictures, of which --data has none; give a "
            "model, or answers about your pictures as recorded:FILE.jsonl"
        )
    live = None if opened is None or isinstance(opened, RecordedTeacher) else opened
    _check(ask, aligned, own_answers, live is not None)
    if isinstance(live, BuiltinVlm) and half:
        live.model.to(torch.bfloat16)
    pictures = isinstance(opened, RecordedTeacher) or bool(ask)
    report, samples = _read(data, pictures, on_bad_sample, limit)
    answers = opened.path if isinstance(opened, RecordedTeacher) else None
    if answers is not None:
        # before an older run is replaced
        samples = recorded_answers(answers, samples, report)
    read = (data, student, teacher, (vision or "").removeprefix(CLIP_STUDENT), tokenizer, words)
    make_room(out, resume, overwrite, tuple(path for path in read if path))
    begun = {
        "data": str(data), "teacher": None if live is None else live.fingerprint, "student": student, "ask": list(ask),
        "aligned": aligned, "own_answers": own_answers, "max_new_tokens": max_new_tokens, "limit": limit,
        "recipe": recipe.digest(), "vision": vision, "words": None if words is None else str(words),
        "tokenizer": None if tokenizer is None else sha256_file(Path(tokenizer)),
    }  # fmt: skip
    _check_begun(out, begun)
    if live is not None and not own_answers:
        answers = out / ANSWERS
    if live is not None and answers is not None and not answers.is_file():
        write_answers(live, samples, ask, answers, report, max_new_tokens=max_new_tokens, say=say)
    if live is not None and answers is not None:
        samples = recorded_answers(answers, samples, report)
    elif own_answers:
        samples = [one for sample in samples for one in single_turns(sample)]
    said = () if opened is None else _RECORDED if live is None else live.licences
    model = student_of(
        student, lambda config: _tokenizer(config, live, tokenizer, samples), recipe.optim.seed, licences=said,
        words=words, vision=vision,
    )  # fmt: skip
    model.config = model.config.model_copy(update={"licences": tuple(dict.fromkeys((*model.config.licences, *said)))})
    model.to(where)
    history: list[dict[str, Any]] = []
    with full_float32():
        heard = heard_samples(live, samples, report, say) if live is not None and aligned else {}
        if heard:
            samples = [sample for sample in samples if sample.uid in heard]
        for number, (stage, training) in enumerate(zip(recipe.stages, trainings)):
            # what is too long is counted once
            counted = BadSampleReport() if history else report
            stream = ConversationStream(samples, model, counted, batch=stage.batch, seed=recipe.optim.seed)
            kept = Checkpoints(
                out / "checkpoints" / f"{number}-{stage.name}", recipe.optim.every, recipe.digest(),
                _inputs(stream, model, aligned),
            )  # fmt: skip
            stream.first = kept.done
            say(f"{stage.name}: {stage.steps} steps of {stage.batch}, of {len(stream)} conversations")
            rows = train_vlm(
                model,
                heard_batches(stream, model, heard, where) if heard else batches(stream, workers, where),
                lesson_pixels if heard else pixels_of,
                training,
                lambda row: say(json.dumps(row)),
                loss_of=aligned_loss(aligned) if heard else next_token_loss,
                kept=kept,
            )
            history += [{"stage": stage.name} | row for row in rows]
    save_vlm(model, out / STUDENT, overwrite=True)
    write_text_atomically(out / HISTORY, json.dumps(history, indent=1) + "\n")
    found = {
        "recipe": recipe.model_dump(mode="json"),
        "student": student,
        "teacher": None if opened is None else "recorded" if live is None else live.name.rpartition("/")[2],
        "device": describe_device(where),
        "aligned": aligned,
        "conversations": len(samples),
        "vocabulary": model.tokenizer.vocab_size,
        "left_out": report.to_dict(),
    }
    write_text_atomically(out / FACTS, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _check_begun(out: Path, begun: dict[str, Any]) -> None:
    """Note what a run is begun with, or compare it with what was noted."""
    path = out / BEGUN
    if not path.is_file():
        write_text_atomically(path, json.dumps(begun, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise IntegrityError(
            f"{path.name} in {str(out)!r} is damaged ({error}), so what the run was begun with is unknown; start "
            "anew with overwrite"
        ) from error
    odd = [key for key, value in begun.items() if known.get(key) != value]
    if odd:
        raise IntegrityError(
            f"the run in {str(out)!r} was begun with another {' and '.join(odd)}, so what it learnt would be mixed "
            "with something else; resume it with what it was begun with, or choose another folder"
        )


def _inputs(stream: ConversationStream, model: Vlm, aligned: float) -> str:
    """sha256 of what a stage learns from: the samples' texts in tokens, and the tokenizer."""
    whole = hashlib.sha256(model.tokenizer.json + model.config.model_dump_json().encode())
    whole.update(json.dumps([aligned, [sample.uid for sample in stream.samples], stream.talks]).encode())
    return whole.hexdigest()


def _check(ask: Sequence[str], aligned: float, own_answers: bool, live: bool) -> None:
    if (ask or aligned or own_answers) and not live:
        what = "questions to ask" if ask else "a weight of aligned spans" if aligned else "own answers to read"
        raise UsageError(
            f"{what} came without a teacher that is here to answer, so nothing would be learnt from it; name one "
            "(vlm:FOLDER or hf-vlm:FOLDER), or leave it out"
        )
    if aligned < 0:
        raise UsageError(f"aligned spans were given the weight {aligned:g}, which would unlearn them; give 0 or more")
    if own_answers and (ask or not aligned):
        raise UsageError(
            "the conversations' own answers were asked for together with questions of your own or without a weight of "
            "aligned spans, so the teacher would teach nothing; give --aligned, and leave --ask out"
        )
    if not is_unicode(list(ask)):
        raise UsageError(f"one of the questions {list(ask)} holds bytes that are no UTF-8; write it in UTF-8")
    if any(not question.strip() or MARKER in question for question in ask):
        raise UsageError(
            f"one of the questions {list(ask)} is empty or holds {MARKER}, whose place a prompt decides; write "
            "questions alone"
        )


def _training(stage: StageSection, recipe: VlmRecipe) -> VlmTraining:
    """What `train_vlm` does for a stage.

    Raises:
        UsageError: a stage that compares distributions, or trains only connector or decoder.
    """
    if stage.weights.hears or stage.on_policy or not stage.weights.answer:
        raise UsageError(
            f"stage {stage.name!r} compares distributions or visual tokens, which are kept for the built-in scenes "
            "alone; with --data take a recipe of answers (--recipe answers), and --aligned for a teacher's "
            "probabilities"
        )
    if not {"connector", "decoder"} <= set(stage.train):
        raise UsageError(
            f"stage {stage.name!r} trains {', '.join(stage.train)}, and on own data connector and decoder always move; "
            "put both into train"
        )
    optim = recipe.optim
    return VlmTraining(
        steps=stage.steps,
        rate=stage.rate,
        vision_rate=stage.vision_rate if "vision" in stage.train else 0.0,
        word_rate=stage.word_rate,
        weight_decay=optim.weight_decay,
        warmup=stage.warmup,
        clip=optim.clip,
        bfloat16=optim.bfloat16,
        log_every=min(optim.log_every, stage.steps),
    )


def _read(data: str, pictures: bool, on_bad_sample: str, limit: int | None) -> tuple[BadSampleReport, list[Sample]]:
    """Pictures that can be decoded, with conversations unless `pictures` alone are wanted."""
    if pictures:
        source = open_data(data, on_bad_sample=on_bad_sample)
    else:
        report = BadSampleReport(on_bad_sample)
        source = DataSource(data, read_conversations(data, report), report)
        report.refuse_empty(data, len(source))
    source = drop_undecodable(dataclasses.replace(source, samples=source.samples[:limit]))
    return source.report, source.samples


def _tokenizer(
    config: VlmConfig, teacher: VlmTeacher | None, given: str | Path | None, samples: Sequence[Sample]
) -> bytes:
    if given is not None:
        return Path(given).read_bytes()
    if isinstance(teacher, BuiltinVlm):
        return teacher.model.tokenizer.json
    texts = [turn.text for sample in samples for turn in sample.conversation]
    return train_vlm_tokenizer(texts, config.decoder.vocab_size)
