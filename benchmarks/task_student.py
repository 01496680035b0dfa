"""Few labels and a teacher's zero-shot knowledge: DHO beside its parts and VL2V, in the trained style and another one.

    python -m benchmarks.task_student --other FOLDER [--folds 0 1 2 3 4]

Sixteen kinds of things (`openmoji?labels=kind`), 1, 4 or 16 labels of each; pictures of the student's pool, held-out
concepts of the test pool, which neither teacher nor student has seen. The other style is Fluent Emoji 3D (Microsoft,
MIT): the pictures of the very same test code points; FOLDER is `assets` of the unpacked npm package
`@lobehub/fluent-emoji-3d`. Nothing of it is trained on, chosen by, or committed.

Arms, all with the steps, pictures and trunk of the recipe `dho`:
  ce            cross-entropy with the labels alone, all of them
  kd            the taught head alone, no labels (the same for every number of labels)
  dho           both heads, probabilities mixed as chosen on a quarter of the labels (0.5 and 0.5 where there is none)
  dho-folded    the same run, logits mixed, one linear layer
  vl2v          the recipe's loss with class names as captions, classified by the teacher's class texts; its projection
                starts at the ridge solution, as in its recipe, where the heads of the others start at 0
  teacher       zero-shot
Nothing was tuned. Finished runs are kept in benchmarks/results/task_student.json with their answers, and a run that is
there is not made again. About eight minutes on one core for each fold; the committed result is of fold 0 and one seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results_folder import RESULTS, machine, recipe_digest, write
from pocketvlm.data import open_data
from pocketvlm.data.sample import ImageRef, Sample
from pocketvlm.distill.encoders import StudentEncoder, TeacherEncoder
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.metrics import paired_bootstrap
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.questions import prompt
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.preprocess import load_image, stack
from pocketvlm.students.task import choose_mixing, mixed_logits
from pocketvlm.teachers import load_teacher

FILE = "task_student.json"
SHOTS = (1, 4, 16)
STYLES = ("openmoji", "fluent-3d")
COMMON = ("data.eval=null", "train.threads=1")
VL2V = (
    "task=null",
    "objectives=[{name: vl2v}]",
    "student.fit_projection=0.1",
    "student.fit_views=2",
    "train.freeze={image_tower.trunk: 60}",
)
ARMS: dict[str, tuple[str, ...]] = {
    "ce": ("objectives.dho.options={taught_weight: 0}", "task.validation=0"),
    "kd": ("objectives.dho.options={label_weight: 0}", "task.validation=0", "train.captioned_fraction=null"),
    "dho": (),
    "vl2v": VL2V,
}
SHOWN = ("teacher", "kd", "ce", "vl2v", "dho", "dho-folded")
# (first, second): what the second adds
PAIRS = (("ce", "dho"), ("kd", "dho"), ("vl2v", "dho"), ("teacher", "dho"), ("dho", "dho-folded"))


def changes(arm: str, fold: int, shots: int) -> list[str]:
    data = f"data.train=openmoji?labels=kind&pool=student&fold={fold}&shots={shots}&flags=exclude"
    return [data, f"teacher.spec=openmoji-lit?fold={fold}", *COMMON, *ARMS[arm]]


def test_pictures(fold: int, other: Path) -> dict[str, list[Sample]]:
    """The labelled test pictures that both styles have, in one order."""
    found = {_key(path.stem): path for path in sorted(other.glob("*.webp"))}
    if not found:
        raise UsageError(
            f"{other} holds no .webp pictures, so there is no other style; unpack the package, name assets"
        )
    own = [s for s in open_data(f"openmoji?labels=kind&pool=test&fold={fold}&flags=exclude") if s.label]
    pairs = [(s, found[_key(s.uid.split("/")[1])]) for s in own if _key(s.uid.split("/")[1]) in found]
    drawn = [Sample(s.uid, ImageRef(path=path), label=s.label, group=s.group) for s, path in pairs]
    return dict(zip(STYLES, ([s for s, _ in pairs], drawn)))


def _key(stem: str) -> str:
    return "-".join(f"{int(part, 16):x}" for part in stem.split("-") if part.lower() != "fe0f")


def answers(logits: torch.Tensor, labels: Sequence[str], samples: Sequence[Sample]) -> str:
    """One character a picture: 1 where the largest logit is that of its label."""
    best = logits.argmax(dim=1).tolist()
    return "".join("1" if labels[place] == sample.label else "0" for place, sample in zip(best, samples))


def trained(recipe: Recipe, report: Reporter) -> Trainer:
    trainer = Trainer(prepare(recipe, report), torch.device("cpu"))
    trainer.start()
    while trainer.step < trainer.total:
        trainer.one_step(trainer.feed.make(trainer.step))
    return trainer


def batched(encode: Callable[[Any], torch.Tensor], samples: Sequence[Sample], spec: Any) -> torch.Tensor:
    with torch.no_grad():
        parts = [samples[at : at + 32] for at in range(0, len(samples), 32)]
        pixels = (torch.from_numpy(stack([load_image(s.image.read(), spec) for s in part])) for part in parts)
        return torch.cat([encode(part) for part in pixels])


def class_texts(teacher: Any, labels: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    encoder = TeacherEncoder(teacher)
    each = [encoder.embed_text([prompt(template, label) for label in labels]) for template in templates]
    return torch.nn.functional.normalize(torch.from_numpy(np.mean(each, axis=0)), dim=1)


def run_arm(
    recipe: Recipe, arm: str, pictures: dict[str, list[Sample]], labels: Sequence[str], texts: torch.Tensor
) -> dict[str, Any]:
    """Answers of what one training gives, by name and style."""
    began = time.process_time()
    trainer = trained(recipe, Reporter(False))
    spent, student, found = time.process_time() - began, trainer.student, {}
    with trainer.averaged(), torch.no_grad():
        student.eval()
        if arm == "vl2v":
            encoder = StudentEncoder(student)
            for style, samples in pictures.items():
                decoded = [load_image(s.image.read(), student.image_spec) for s in samples]
                found[f"{arm}/{style}"] = answers(
                    torch.from_numpy(encoder.embed_image(decoded)) @ texts.T, labels, samples
                )
            return {"answers": found, "cpu_s": round(spent, 1)}
        task, heads = trainer.prepared.task, student.heads
        assert task is not None
        assert heads is not None
        assert list(task.classes.labels) == list(labels)
        held = [row for row, label in enumerate(task.held) if label >= 0]
        chosen = {"probabilities": (0.5, 0.5), "logits": (0.5, 1.0)}
        if held:
            known = torch.tensor([task.held[row] for row in held])
            both = trainer.feed.class_logits(student, held)
            chosen = {mix: choose_mixing(*both, known, mix) for mix in ("probabilities", "logits")}  # type: ignore[arg-type]
        for style, samples in pictures.items():
            features = batched(lambda x: student.encode_image(x).features, samples, student.image_spec)
            own, taught = heads(features)
            if arm != "dho":
                found[f"{arm}/{style}"] = answers(own if arm == "ce" else taught, labels, samples)
                continue
            for name, mix in (("dho", "probabilities"), ("dho-folded", "logits")):
                logits = mixed_logits(own, taught, *chosen[mix], mix)  # type: ignore[arg-type]
                found[f"{name}/{style}"] = answers(logits, labels, samples)
    return {"answers": found, "cpu_s": round(spent, 1), "mixing": chosen, "held_out": len(held)}


def fold_rows(fold: int, other: Path, rows: dict[str, Any], keep: Callable[[], None]) -> None:
    """All runs of one fold that are not in `rows` yet."""
    wanted = [("kd", 0), *((arm, shots) for shots in SHOTS for arm in ("ce", "dho", "vl2v"))]
    digests = {
        f"{fold}/{shots}/{arm}": recipe_digest("dho", changes(arm, fold, max(shots, 1))) for arm, shots in wanted
    }
    missing = [
        (arm, shots)
        for arm, shots in wanted
        if rows.get(f"{fold}/{shots}/{arm}", {}).get("recipe") != digests[f"{fold}/{shots}/{arm}"]
    ]
    if not missing and f"{fold}/0/teacher" in rows:
        return
    pictures = test_pictures(fold, other)
    templates = load_recipe("dho").eval.templates
    labels = sorted({s.label for s in open_data("openmoji?labels=kind") if s.label})
    teacher = load_teacher(f"openmoji-lit?fold={fold}")
    texts = class_texts(teacher, labels, templates)
    if f"{fold}/0/teacher" not in rows:
        found = {}
        for style, samples in pictures.items():
            x = batched(lambda p: teacher.encode_images(p).embedding.float(), samples, teacher.image)
            found[f"teacher/{style}"] = answers(x @ texts.T, labels, samples)
        row = {"answers": found, "uids": [s.uid for s in pictures["openmoji"]]}
        rows[f"{fold}/0/teacher"] = row | {"groups": [s.group for s in pictures["openmoji"]]}
        keep()
    for arm, shots in missing:
        recipe = load_recipe("dho", changes(arm, fold, max(shots, 1)))
        name = f"{fold}/{shots}/{arm}"
        rows[name] = run_arm(recipe, arm, pictures, labels, texts) | {"recipe": digests[name]}
        print(
            name,
            {key: round(value.count("1") / len(value), 3) for key, value in rows[name]["answers"].items()},
            flush=True,
        )
        keep()


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Shares of right answers, pooled over the folds, for the numbers of labels that all
    of them have, and paired differences over base concepts."""
    names = {"teacher": ("0", "teacher"), "kd": ("0", "kd")}
    folds = sorted({key.split("/")[0] for key in rows})
    whole = [f for f in folds if f"{f}/0/kd" in rows]
    counts = [n for n in SHOTS if whole and all(f"{f}/{n}/{a}" in rows for f in whole for a in ("ce", "dho", "vl2v"))]

    def hits(arm: str, shots: int, style: str) -> np.ndarray:
        at, run = names.get(arm, (str(shots), "dho" if arm == "dho-folded" else arm))
        parts = [rows[f"{fold}/{at}/{run}"]["answers"][f"{arm}/{style}"] for fold in whole]
        return np.array([float(c) for part in parts for c in part])

    groups = [group for fold in whole for group in rows[f"{fold}/0/teacher"]["groups"]]
    found: dict[str, Any] = {"folds": whole, "pictures": len(groups), "concepts": len(set(groups)), "top-1": {}}
    found["differences"] = {}
    for style in STYLES:
        for shots in counts:
            key = f"{style}/{shots}"
            found["top-1"][key] = {arm: round(float(hits(arm, shots, style).mean()), 4) for arm in SHOWN}
            found["differences"][key] = {
                f"{second} - {first}": {
                    name: round(value, 4)
                    for name, value in paired_bootstrap(
                        hits(second, shots, style), hits(first, shots, style), clusters=groups
                    ).to_dict().items()
                    if name in ("difference", "low", "high")
                }
                for first, second in PAIRS
            }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    """The table of docs/recipes.md: per cent right, and paired differences."""
    lines = [
        "| pictures | labels of each class | "
        + " | ".join(f"`{arm}`" for arm in SHOWN)
        + " | dho − ce (95 %) | dho − vl2v (95 %) |"
    ]
    lines.append("|---|---:|" + "---:|" * (len(SHOWN) + 2))
    for key in found["top-1"]:
        style, shots = key.split("/")
        cells = [f"{100 * found['top-1'][key][arm]:.1f}" for arm in SHOWN]
        for pair in ("dho - ce", "dho - vl2v"):
            gap = found["differences"][key][pair]
            low, middle, high = (f"{100 * gap[name]:+.1f}" for name in ("low", "difference", "high"))
            cells.append(f"{middle} ({low} to {high})")
        lines.append(f"| {style} | {shots} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--other", type=Path, required=True, help="folder of the other style's pictures")
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / FILE
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
    for fold in given.folds:
        fold_rows(fold, given.other, result["rows"], lambda: write(FILE, result) and None)
    result = {"machine": machine(), "summary": summary(result["rows"]), "rows": result["rows"]}
    write(FILE, result)
    print(table(result["summary"]))


if __name__ == "__main__":
    main()
