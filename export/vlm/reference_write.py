"""`record_vlm_reference`: ask an unpatched generative student, and keep what its files are later held to."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocketvlm.data.exact_match import exact_match
from pocketvlm.data.scenes import SceneTable, picture_set
from pocketvlm.distill.vlm.evaluate import SCENES_SEED, drawn_questions, longest_answer
from pocketvlm.edge.bundle import sha256_file
from pocketvlm.edge.contract import identity
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.export import reference_run as layout
from pocketvlm.export.numerics import (
    command_line,
    describe_environment,
    reference_device,
    strict_facts,
    strict_numerics,
    tf32,
)
from pocketvlm.export.reference_write import Writer, draft_of, refuse_full_folder, write_sheets
from pocketvlm.export.vlm import reference as own
from pocketvlm.export.vlm.reference import Case, TaskQuestion, VlmReference, best_two, kl, load_vlm_reference
from pocketvlm.students.vlm import Vlm, load_vlm
from pocketvlm.students.vlm.io import MANIFEST
from pocketvlm.students.vlm.model import rows_of
from pocketvlm.students.vlm.tokenizer import EOS

# of a batch, here and on every machine
BATCH = 32
# cases whose every logit is kept, the first ones whose answers fit; the others keep the two best and the log-sum-exp
WHOLE_BYTES = 3_000_000
# cases that the noise floor is taken of, where it is not float32 against float64
NOISE_CASES = 32
Logits = NDArray[np.float64]
# a picture uint8 [S, S, 3], a prompt, tokens of an answer at most
Prompted = tuple[NDArray[np.uint8], str, int]
Progress = Callable[[str], None]


def record_vlm_reference(
    folder: str | Path,
    out: str | Path,
    *,
    device: str | torch.device = "auto",
    prompts: int = 100,
    questions: int = 1000,
    fold: int = 0,
    limit: int | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress = lambda line: None,
) -> VlmReference:
    """Record prompts, answers, logits, questions and the noise floor of a saved student into the folder `out`.

    Args:
        folder: of `save_vlm`. device: "cpu" (float64), "cuda" (float32, TF32 off) or "auto".
        prompts, questions, fold, limit: as `parity.check_vlm_parity`.
        command: recorded as the command that made it; by default the running one, without machine paths.

    Returns:
        The recording, read back from disk and verified.

    Raises:
        UsageError: `out` is not empty and `overwrite` is False, no prompts, no such student or device.
        IntegrityError: the student's logits are not finite.
    """
    folder, out = Path(folder), Path(out).resolve()
    refuse_full_folder(out, overwrite)
    where = reference_device(device)
    dtype = torch.float64 if where.type == "cpu" else torch.float32
    student = load_vlm(folder)
    drawn = draw(student, prompts=prompts, questions=questions, fold=fold, limit=limit)
    with draft_of(out) as part:
        (part / "pixels").mkdir()
        files = Writer(part)
        with strict_numerics(where):
            strict = strict_facts(where, dtype)
            model = copy.deepcopy(student).to(where, dtype)
            progress(f"{len(drawn.asked)} prompts in {strict['dtype']} on {where.type}")
            cases = answered(model, drawn.asked)
            progress(f"{len(drawn.task)} questions")
            task = right_answers(model, drawn)
            progress("the noise floor: again, batches, float32 against float64, TF32")
            noise = _noise(student, model, drawn.asked, cases)
        whole = _whole(cases)
        files.json(own.PIXELS, write_sheets(files, "pixels", np.stack(drawn.scenes)))
        files.json(
            own.CASES,
            [
                {
                    "scene": scene, "prompt": case.prompt, "ids": case.ids, "said": case.said, "text": case.text,
                    "longest": longest, "margins": case.margins.tolist(), "whole": number in whole,
                }
                for number, (case, scene, (_, _, longest)) in enumerate(zip(cases, drawn.asked_scenes, drawn.asked))
            ],
        )  # fmt: skip
        files.npz(
            own.LOGITS,
            # every number that a file is compared with is in float64, but for these, whose size counts
            logits=np.concatenate([_of(cases[number]) for number in whole]).astype(np.float32),
            best=np.concatenate([case.best for case in cases]).astype(np.int32),
            best_logits=np.concatenate([case.best_logits for case in cases]),
            log_sum=np.concatenate([case.log_sum for case in cases]),
        )
        files.json(
            own.TASK,
            [
                {
                    "scene": scene, "text": question.text, "type": question.type, "answer": question.answer,
                    "longest": question.longest, "right": question.right,
                }
                for question, scene in zip(task, drawn.task_scenes)
            ],
        )  # fmt: skip
        files.json(own.NOISE, noise)
        saved = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        hashes = {MANIFEST: sha256_file(folder / MANIFEST)} | {name: row["sha256"] for name, row in saved.items()}
        manifest = {
            "schema_version": own.SCHEMA_VERSION,
            "kind": own.KIND,
            "model_id": model_id_of(student, folder),
            "student": student.config.name,
            "licences": [list(row) for row in student.config.licences],
            "sha256": hashes,
            "numerics": {**strict, "batch_size": BATCH},
            "environment": describe_environment(where),
            "seeds": {"scenes": SCENES_SEED},
            "command": command or command_line(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "data": {"pool": "test", "fold": fold, "limit": limit},
            "counts": {
                "prompts": len(cases), "steps": sum(len(case.said) for case in cases),
                "prompts_with_all_logits": len(whole), "questions": len(task), "scenes": len(drawn.scenes),
            },
            "files": files.listing,
        }  # fmt: skip
        (part / layout.MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        load_vlm_reference(part)
    return load_vlm_reference(out)


def model_id_of(student: Vlm, folder: Path) -> str:
    """The name by which a bundle and a recording know that they are of one student."""
    return identity(student.config.name, sha256_file(folder / MANIFEST))


class Drawn:
    """Scenes of the test pool and what is asked about them.

    scenes: uint8 [S, S, 3] each. asked: the prompts, each about a scene of its own. task: (picture, `Question`).
    asked_scenes, task_scenes: numbers of their scenes.
    """

    def __init__(self, scenes: list[NDArray[np.uint8]], found: list[list[Any]], prompts: int, questions: int) -> None:
        self.scenes = scenes
        self.asked_scenes = [number for number, own in enumerate(found) if own][:prompts]
        first = [found[number][0] for number in self.asked_scenes]
        self.asked: list[Prompted] = [
            (scenes[number], question.text, longest_answer(question))
            for number, question in zip(self.asked_scenes, first)
        ]
        every = [(number, question) for number, own in enumerate(found) for question in own][:questions]
        self.task_scenes = [number for number, _ in every]
        self.task = [(scenes[number], question) for number, question in every]


def draw(student: Vlm, *, prompts: int, questions: int, fold: int, limit: int | None) -> Drawn:
    """The first scenes of the test stream, at the student's size.

    Raises:
        UsageError: no prompts.
    """
    if prompts < 1:
        raise UsageError(f"{prompts} prompts were asked for; nothing would be compared, so give 1 or more")
    pictures = picture_set("test", fold, limit=limit)
    table = SceneTable.build(pictures, student.config.vision.size)
    drawn = drawn_questions(pictures, scenes=max(prompts, -(-questions // 4)))
    return Drawn([table.compose(scene) for scene, _ in drawn], [found for _, found in drawn], prompts, questions)


def answer_now(
    student: Vlm, model_id: str, drawn: Drawn, fold: int, progress: Progress = lambda line: None
) -> VlmReference:
    """What `load_vlm_reference` gives, of a student on the CPU that answers in float32, its logits in float64."""
    progress(f"the student answers {len(drawn.asked)} prompts in float32 and float64")
    cases, noise, noise_kl = record_cases(student, drawn.asked)
    progress(f"the student answers {len(drawn.task)} questions")
    return VlmReference(model_id, fold, cases, right_answers(student, drawn), noise, noise_kl)


def record_cases(model: Vlm, asked: Sequence[Prompted]) -> tuple[list[Case], float, float]:
    """Cases whose answers are float32's and whose logits are float64's, and what float32 costs the student: the
    largest difference of a logit and the mean KL in nats. model: float32, on any device; float64 is computed there."""
    cases = answered(model, asked, copy.deepcopy(model).double())
    cost = _apart([_of(case) for case in cases], forced_logits(model, cases))
    return cases, cost["max_abs"], cost["kl_mean"]


def answered(model: Vlm, asked: Sequence[Prompted], judge: Vlm | None = None) -> list[Case]:
    """The model's greedy answer to each prompt, asked one by one, with all its logits. judge: gives the logits instead.

    Raises:
        IntegrityError: a logit is NaN or infinite, or is not the one that the answer was chosen by.
    """
    plain = []
    for pixels, prompt, longest in asked:
        said = model.answer_ids(_batch([pixels], model), [prompt], max_new_tokens=longest)[0]
        text = model.tokenizer.decode(said[:-1] if said[-1] == EOS else said)
        plain.append((prompt, pixels, model.prompt_ids(prompt), said, text))
    cases = []
    for one, logits in zip(plain, _forced(judge or model, [(one[1], one[2], one[3]) for one in plain], 1)):
        if not np.isfinite(logits).all():
            raise IntegrityError(
                f"the logits of {model.config.name!r} are NaN or infinite, so nothing can be held to them; look for a "
                "diverged training"
            )
        cases.append(Case(*one, logits, *best_two(logits)))
        if judge is None and cases[-1].best[:, 0].tolist() != one[3]:
            raise IntegrityError(
                f"{model.config.name!r} chose another answer to {one[0]!r} token by token than all at once; two "
                "words are as good as tied, or its cache is wrong, so nothing can be held to it; record on "
                "the CPU, in float64"
            )
    return cases


def forced_logits(
    model: Vlm,
    cases: Sequence[Case],
    batch: int = 1,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[Logits]:
    """Logits [n, V] of the tokens of each case's answer, all given at once. inside: entered around the model."""
    with inside():
        return _forced(model, [(case.pixels, case.ids, case.said) for case in cases], batch)


@torch.no_grad()
def _forced(model: Vlm, told: Sequence[tuple[NDArray[np.uint8], list[int], list[int]]], batch: int) -> list[Logits]:
    found: list[Logits] = []
    for start in range(0, len(told), batch):
        part = told[start : start + batch]
        talks = [[(ids, said)] for _, ids, said in part]
        rows = rows_of(talks, max(len(ids) + len(said) for _, ids, said in part)).to(model.device)
        logits = model(_batch([pixels for pixels, _, _ in part], model), rows).double().cpu().numpy()
        found += np.split(logits, np.cumsum([len(said) for _, _, said in part])[:-1])
    return found


def right_answers(model: Vlm, drawn: Drawn) -> list[TaskQuestion]:
    """Every question of the task with whether the model answers it rightly; alike lengths are asked together."""
    lengths = [longest_answer(question) for _, question in drawn.task]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    said: dict[int, str] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        pixels = _batch([drawn.task[i][0] for i in part], model)
        texts = [drawn.task[i][1].text for i in part]
        said |= dict(zip(part, model.generate(pixels, texts, max_new_tokens=max(lengths[i] for i in part))))
    return [
        TaskQuestion(pixels, q.text, q.type, q.answer, lengths[i], exact_match(said[i], q.answer))
        for i, (pixels, q) in enumerate(drawn.task)
    ]


def _batch(pixels: Sequence[NDArray[np.uint8]], model: Vlm) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).to(model.device)


def _of(case: Case) -> Logits:
    assert case.logits is not None, "a case that was just answered has all its logits"
    return case.logits


def _whole(cases: Sequence[Case]) -> list[int]:
    """Numbers of the cases whose every logit is kept: as many as fit, in order, and the first in any case."""
    kept, used = list[int](), 0
    for number, case in enumerate(cases):
        size = 4 * _of(case).size
        if not kept or used + size <= WHOLE_BYTES:
            kept.append(number)
            used += size
    return kept


def _apart(expected: Sequence[Logits], found: Sequence[Logits]) -> dict[str, float]:
    return {
        "max_abs": float(max(np.abs(a - b).max() for a, b in zip(expected, found, strict=True))),
        "kl_mean": float(np.concatenate([kl(a, b) for a, b in zip(expected, found)]).mean()),
    }


def _noise(student: Vlm, model: Vlm, asked: Sequence[Prompted], cases: Sequence[Case]) -> dict[str, Any]:
    """The reference against itself under other arithmetic: of logits max_abs and the mean KL in nats, and how many
    greedy answers are the same.

    "float32" compares float32 with float64 over every case; "rerun" is the recording's own arithmetic once more,
    "batch" float32 in batches of `BATCH` against one by one, "tf32" float32 with tensor cores or their emulation (which
    "made" says) against float32, each over the first `NOISE_CASES`. student: float32 on the CPU. model: what recorded.
    """
    few, recorded, said = cases[:NOISE_CASES], [_of(case) for case in cases], [case.said for case in cases]
    wide, single = (model, student) if model.device.type == "cpu" else (copy.deepcopy(student).double(), model)
    exact, float32 = (recorded if one is model else forced_logits(one, cases) for one in (wide, single))
    exactly, alone = (said if one is model else _ids(one, asked, 1) for one in (wide, single))

    def entry(
        expected: list[Logits], found: list[Logits], one: list[list[int]], two: list[list[int]]
    ) -> dict[str, Any]:
        # in a batch the longest prompt may leave a shorter rest of the cache
        same = sum(a[: len(b)] == b for a, b in zip(one, two, strict=True))
        return {**_apart(expected, found), "same_answers": same, "cases": len(found)}

    number = len(few)
    made, inside = tf32(model.device)
    with inside():
        rounded = _ids(single, asked[:number], 1)
    return {
        "float32": entry(exact, float32, exactly, alone),
        "rerun": entry(recorded[:number], forced_logits(model, few), said[:number], _ids(model, asked[:number], 1)),
        "batch": entry(
            float32[:number], forced_logits(single, few, BATCH), alone[:number], _ids(single, asked[:number], BATCH)
        ),
        "tf32": {
            **entry(float32[:number], forced_logits(single, few, inside=inside), alone[:number], rounded),
            "made": made,
        },
    }


def _ids(model: Vlm, asked: Sequence[Prompted], batch: int) -> list[list[int]]:
    """Ids of greedy answers, each as long as its own question lets it be."""
    found: list[list[int]] = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        longest = max(length for _, _, length in part)
        pixels = _batch([pixels for pixels, _, _ in part], model)
        answers = model.answer_ids(pixels, [prompt for _, prompt, _ in part], max_new_tokens=longest)
        found += [said[:length] for said, (_, _, length) in zip(answers, part)]
    return found
