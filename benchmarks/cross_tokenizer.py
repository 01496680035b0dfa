"""The talking teacher taught to a student with another tokenizer: labels alone, aligned spans, GenRecal-style.

    python -m benchmarks.cross_tokenizer --teacher runs/talking-teacher

The student (frozen EfficientNet-Lite0 at 96 px, a decoder of about a million parameters, a vocabulary of 1,024 against
the teacher's 12,288) learns questions about scenes of the student pool's pictures with their right answers. The three
runs see the same batches in the same order for the same steps, from the same weights; the second adds the divergence of
spans, the third the recalibrator, which here is trained with the student from the first step on and not before it.
Scored on scenes of the test pool's pictures, and on new scenes of those it learnt from. --toy only shows that it runs.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from benchmarks.results_folder import RESULTS, machine, write
from pocketvlm.data.scene_questions import ask_about
from pocketvlm.data.scenes import PictureSet, SceneTable, picture_set
from pocketvlm.distill.vlm.across import Lesson, aligned, lesson_batches, lesson_pixels, read_lessons, recalibrated
from pocketvlm.distill.vlm.aligned import shared_spans, token_log_probabilities
from pocketvlm.distill.vlm.evaluate import evaluate_vlm, table
from pocketvlm.distill.vlm.features import without_trunk
from pocketvlm.distill.vlm.genrecal import Recalibrator
from pocketvlm.distill.vlm.teachers import answer_ends, load_vlm_teacher
from pocketvlm.distill.vlm.train import VlmTraining, next_token_loss, train_vlm
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm_config, train_vlm_tokenizer
from pocketvlm.teachers.vlm.base import VlmTeacher

STUDENT = "vlm-8m"
CHANGES: dict[str, Any] = {
    "vision.size": 96,
    "connector_hidden": 256,
    "decoder.width": 128,
    "decoder.layers": 4,
    "decoder.heads": 4,
    "decoder.kv_heads": 2,
    "decoder.hidden": 384,
    "decoder.context_length": 128,
}
VOCABULARY = 1024
ARMS = ("labels", "aligned", "genrecal-style")
_SEED = 77


def questions(pictures: PictureSet, scenes: int, each: int) -> tuple[list[Any], list[tuple[str, str]], list[int]]:
    """Scenes, pairs and the scene of each pair."""
    drawn = [ask_about(pictures, _SEED, index, each) for index in range(scenes)]
    pairs = [(question.text, question.answer) for _, asked in drawn for question in asked]
    owner = [index for index, (_, asked) in enumerate(drawn) for _ in asked]
    return [scene for scene, _ in drawn], pairs, owner


def shown(scenes: list[Any], pictures: PictureSet, side: int) -> Tensor:
    """uint8 [N, S, S, 3]."""
    made = SceneTable.build(pictures, side)
    return torch.stack([torch.from_numpy(made.compose(scene)) for scene in scenes])


@torch.no_grad()
def kept_features(model: Vlm, pixels: Tensor) -> Tensor:
    """float16 [N, K, C]."""
    return torch.cat([model.vision(part).half() for part in pixels.split(32)])


def taught(teacher: VlmTeacher, scenes: Tensor, pairs: list[tuple[str, str]], owner: list[int]) -> list[Lesson]:
    made: list[Lesson] = []
    for start in range(0, len(pairs), 256):
        part = slice(start, start + 256)
        made += read_lessons(teacher, scenes[owner[part]], pairs[part])
        print(f"teacher: {len(made)} of {len(pairs)} pairs read", flush=True)
    return made


def run_arm(arm: str, model: Vlm, teacher: Any, lessons: list[Lesson], training: VlmTraining, batch: int) -> list[Any]:
    recalibrator = None
    loss = next_token_loss
    if arm == "aligned":
        loss = aligned()
    elif arm == "genrecal-style":
        recalibrator = Recalibrator(model.config.decoder, teacher.width)
        loss = recalibrated(recalibrator, teacher.head)
    with without_trunk(model):
        batches = lesson_batches(lessons, model, batch=batch)
        return train_vlm(
            model,
            batches,
            lesson_pixels,
            training,
            lambda row: print(arm, json.dumps(row), flush=True),
            loss_of=loss,
            beside=recalibrator,
        )


def main(
    teacher: Annotated[Path, tyro.conf.arg(help="Folder of the talking teacher.")] = Path("runs/talking-teacher"),
    fold: int = 0,
    scenes: Annotated[int, tyro.conf.arg(help="To learn from.")] = 500,
    each: Annotated[int, tyro.conf.arg(help="Questions about a scene.")] = 3,
    steps: int = 350,
    batch: int = 24,
    tested: Annotated[int, tyro.conf.arg(help="Scenes of each evaluation, four questions each.")] = 200,
    seed: int = 0,
    toy: bool = False,
    out: Path = RESULTS / "cross_tokenizer.json",
) -> None:
    begun = time.monotonic()
    if toy:
        scenes, steps, batch, tested = 8, 4, 4, 4
    known = load_vlm_teacher(f"vlm:{teacher}")
    learnt = picture_set("student", fold, limit=40 if toy else None)
    asked = picture_set("test", fold, limit=40 if toy else None)
    drawn, pairs, owner = questions(learnt, scenes, each)
    tokenizer = train_vlm_tokenizer([text for pair in pairs for text in pair], VOCABULARY)
    config = load_vlm_config(STUDENT, CHANGES)

    def fresh() -> Vlm:
        return build_vlm(config, tokenizer, seed=seed)

    model = fresh()
    side = known.model.config.vision.size  # type: ignore[attr-defined]
    lessons = taught(known, shown(drawn, learnt, side), pairs, owner)
    read = time.monotonic()
    features = kept_features(model.eval(), shown(drawn, learnt, config.vision.size))
    lessons = [dataclasses.replace(lesson, pixels=features[row]) for lesson, row in zip(lessons, owner)]
    spans = shared_spans([answer_ends(model, pair[1]) for pair in pairs], [one.scored.ends for one in lessons])
    sure = [float(token_log_probabilities(one.scored.logits, one.scored.ids).sum()) for one in lessons]
    first = [bool((one.scored.logits.argmax(-1) == one.scored.ids).all()) for one in lessons]
    training = VlmTraining(
        steps=steps, rate=2e-3, warmup=min(50, steps // 4), word_rate=1.0, log_every=max(steps // 10, 1)
    )
    result: dict[str, Any] = {
        "teacher": known.fingerprint,
        "student": {"name": STUDENT, "changes": CHANGES, "parameters": sum(w.numel() for w in model.parameters())},
        "vocabulary": {"student": model.tokenizer.vocab_size, "teacher": known.vocab_size},
        "fold": fold,
        "seed": seed,
        "toy": toy,
        "training": dataclasses.asdict(training) | {"batch": batch, "scenes": scenes, "pairs": len(pairs)},
        "answers": {
            "student_tokens": len(spans.student),
            "teacher_tokens": len(spans.teacher),
            "spans": spans.number,
            "teacher_log_probability": round(sum(sure) / len(sure), 4),
            "teacher_right": round(sum(first) / len(first), 4),
        },
        "seconds": {"teacher": round(read - begun, 1)},
        "machine": machine(),
        "arms": {},
    }
    for arm in ARMS:
        start = time.monotonic()
        model = fresh()
        history = run_arm(arm, model, known, lessons, training, batch)
        trained = time.monotonic()
        scores = {
            "test": evaluate_vlm(model, asked, scenes=tested),
            "student": evaluate_vlm(model, learnt, scenes=tested),
        }
        result["arms"][arm] = {"history": history, "scores": scores, "seconds": round(trained - start, 1)}
        result["seconds"][arm] = round(time.monotonic() - start, 1)
        print(arm, {name: (round(v["accuracy"], 4), round(v["mean"], 4)) for name, v in scores.items()}, flush=True)
        result["seconds"] |= {"all": round(time.monotonic() - begun, 1), "processor": round(time.process_time(), 1)}
        write(out.name, result, out.parent)
    for pool in ("test", "student"):
        print(pool)
        table({arm: values["scores"][pool] for arm, values in result["arms"].items()})


if __name__ == "__main__":
    tyro.cli(main)
