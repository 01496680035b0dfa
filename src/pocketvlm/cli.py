"""The command line: one function per subcommand; everything heavy is imported inside it.

Edge commands (`embed`, `classify`, `index`, `search`, `list`, `doctor`) work on the base install, without torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import Positional, arg

from pocketvlm import (
    cli_edge,
    cli_engine,
    cli_measure,
    cli_mobile,
    cli_parity,
    cli_search,
    cli_tokens,
    cli_vlm,
    cli_vlm_distill,
)
from pocketvlm.edge.errors import PocketvlmError, UsageError, unknown_name
from pocketvlm.table import emit

ABOUT = "Distil vision-language knowledge into small dual encoders, export them, prove parity, run them on devices."

app = tyro.extras.SubcommandApp()
teacher_app = tyro.extras.SubcommandApp()
reference_app = tyro.extras.SubcommandApp()
vlm_app = tyro.extras.SubcommandApp()
app.command(teacher_app, name="teacher", help="Look at a teacher before you train on it.")
app.command(reference_app, name="reference", help="Record and show reference runs.")
app.command(vlm_app, name="vlm", help="Models that answer in words: distil, score, export, prove, ask.")
cli_engine.register(app)
cli_measure.register(app)
cli_mobile.register(app)
cli_search.register(app)
cli_tokens.register(app)
cli_vlm_distill.register(vlm_app)
cli_vlm.register(vlm_app)

Json = Annotated[bool, arg(name="json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, arg(help="Replace an output folder that is not empty.")]
Data = Annotated[
    str, arg(metavar="SOURCE", help="Data source, for instance 'openmoji', 'pairs.jsonl', 'folder:photos'.")
]
Out = Annotated[Path, arg(help="Output folder; must be empty or absent.")]
OnBad = Annotated[
    Literal["skip", "refuse"], arg(help="Bad samples: count, report and leave them out, or stop at the first.")
]
Device = Annotated[str, arg(help="auto, cpu, cuda, cuda:N or mps.")]
From = Annotated[
    str | None, arg(name="from", metavar="MODEL", help="A dual encoder of yours: open_clip:NAME@WEIGHTS or hf:DIR.")
]
AllowDownload = Annotated[bool, arg(help="Let a model that is not on this machine be fetched from its hub.")]
TrustRemoteCode = Annotated[bool, arg(help="Run Python code that comes with a Hugging Face checkpoint.")]
Share = Annotated[float, arg(metavar="SHARE", help="Share of each tower's heads, MLP groups or blocks that stays.")]
Names = Literal["students", "teachers", "objectives", "data", "targets", "recipes"]


@app.command
def demo(
    out: Annotated[
        Path | None, arg(help="Output folder; must be empty or absent. Left out: runs/demo, with --vlm runs/demo-vlm.")
    ] = None,
    vlm: Annotated[
        bool, arg(help="A model that answers questions about a picture, instead of a dual encoder.")
    ] = False,
    quick: Annotated[bool, arg(help="Fewer steps and targets: at most 3 minutes instead of 15.")] = False,
    fold: Annotated[int, arg(help="Which fifth of the concepts is held out for testing (0 to 4).")] = 0,
    picture: Annotated[
        Path | None, arg(metavar="FILE", help="With --vlm: a photograph of yours, asked --question in the end.")
    ] = None,
    question: Annotated[str | None, arg(metavar="TEXT", help="With --vlm: what is asked about --picture.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Take real knowledge down the whole road: data, teacher, student, bundle, reference, parity, edge."""
    if vlm:
        from pocketvlm.demo_vlm import run_vlm_demo

        run_vlm_demo(
            out or Path("runs/demo-vlm"),
            quick=quick,
            fold=fold,
            overwrite=overwrite,
            picture=picture,
            question=question,
        )
        return
    if picture is not None or question is not None:
        raise UsageError("--picture and --question are for a model that answers, and this demo's embeds; add --vlm")
    from pocketvlm.demo import run_demo

    run_demo(out or Path("runs/demo"), quick=quick, fold=fold, overwrite=overwrite)


@app.command(name="list")
def list_names(what: Annotated[Positional[Names], arg(help="What to list.")], as_json: Json = False) -> None:
    """List what can be named: students (with parameters and MACs), teachers, objectives, data, targets, recipes."""
    from pocketvlm.listing import listing

    rows = listing(what)
    long = [key for key in ("objectives", "formula", "paper", "description") if rows and key in rows[0]]
    emit(rows, as_json, title=what, below=() if what == "data" else long)


@teacher_app.command(name="check")
def teacher_check(
    teacher: Annotated[Positional[str], arg(metavar="TEACHER", help="As 'pocketvlm list teachers' shows it.")],
    data: Data,
    on_bad_sample: OnBad = "skip",
    device: Device = "auto",
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score a teacher on your own data, beside chance and a simple baseline, before anyone trains on it."""
    from pocketvlm.distill.check_teacher import check_teacher
    from pocketvlm.distill.progress import Reporter, Stages
    from pocketvlm.distill.student_teacher import open_teacher

    with Stages(Reporter(), "teacher") as progress:
        loaded = open_teacher(
            teacher, device=device, allow_download=allow_download, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip
    report = check_teacher(loaded, _open(data, on_bad_sample))
    _print(report.to_dict() if as_json else report.table(), as_json)
    if report.worse_than_baseline:
        sys.exit(1)


@app.command
def distill(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")],
    overrides: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]", help="Changes such as train.steps=200.")
    ] = (),
    *,
    out: Out,
    on_bad_sample: Annotated[
        Literal["recipe", "skip", "refuse"],
        arg(help="Bad samples: count, report and leave them out, or stop at the first; or as the recipe says."),
    ] = "recipe",
    resume: Annotated[bool, arg(help="Go on from the last checkpoint in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a student by a recipe; writes checkpoints, metrics.jsonl and report.html into --out."""
    from pocketvlm.distill.loop import distill_run
    from pocketvlm.distill.overrides import as_typed
    from pocketvlm.distill.recipe import load_recipe

    if on_bad_sample != "recipe":
        overrides = (*overrides, f"data.on_bad_sample={on_bad_sample}")
    result = distill_run(load_recipe(recipe, as_typed(overrides)), out, resume=resume, overwrite=overwrite)
    if result.rank == 0:
        print(f"student: {result.student}\nreport:  {result.report}")


@app.command
def truncate(
    source: Annotated[Positional[Path], arg(metavar="SOURCE", help="A run or student folder.")],
    *,
    text_layers: Annotated[int | None, arg(metavar="N", help="Layers of the text tower to keep; default: all.")] = None,
    dim: Annotated[int | None, arg(metavar="N", help="Numbers of the embedding to keep; default: all.")] = None,
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Cut out a smaller student that this one promises (dims, exits); eval, export and parity take the result."""
    from pocketvlm.distill.run_folder import save_truncated

    saved = save_truncated(source, out, text_layers=text_layers, dim=dim, overwrite=overwrite)
    size = sum(path.stat().st_size for path in saved.iterdir())
    print(f"student: {saved} ({size / 1e6:.1f} MB)")


@app.command(name="eval")
def evaluate(
    model: Annotated[Positional[str], arg(metavar="MODEL", help="A run folder, a student folder or a bundle.")],
    data: Data,
    teacher: Annotated[
        str | None, arg(metavar="TEACHER", help="Report retention and neighbour overlap against this teacher.")
    ] = None,
    against: Annotated[
        str | None, arg(metavar="MODEL", help="Compare with this run, student or bundle instead of a teacher.")
    ] = None,
    metrics: Annotated[
        tuple[str, ...] | None,
        arg(metavar="NAME ...", help="Parts to score, such as 'retrieval hubness', or 'all'; docs/evaluation.md."),
    ] = None,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
    on_bad_sample: OnBad = "skip",
    backend: cli_edge.Backend = "auto",
    precision: cli_edge.Precision = "auto",
    as_json: Json = False,
) -> None:
    """Retrieval, MAP and zero-shot classification of a student or of a shipped bundle."""
    from pocketvlm.distill.evaluate import DEFAULT_METRICS, check_metrics, evaluate_path

    wanted = check_metrics(metrics or DEFAULT_METRICS)
    source = _open(data, on_bad_sample)
    report = evaluate_path(
        model,
        source,
        teacher=teacher,
        against=against,
        metrics_wanted=wanted,
        backend=backend,
        precision=precision,
        allow_download=allow_download,
        trust_remote_code=trust_remote_code,
    )
    _print(report.to_dict() if as_json else report.table(), as_json)


@app.command
def prune(
    source: Annotated[Positional[str], arg(metavar="SOURCE", help="A run or student folder, open_clip:... or hf:...")],
    *,
    out: Out,
    data: Annotated[
        str | None, arg(metavar="SOURCE", help="Captioned pictures to rank on; not those of a test.")
    ] = None,
    method: Annotated[str, arg(metavar="NAME", help="mope, magnitude, prefix or random; docs/students.md.")] = "mope",
    keep_heads: Share = 1.0,
    keep_mlp: Share = 1.0,
    keep_depth: Share = 1.0,
    towers: Annotated[tuple[str, ...], arg(metavar="TOWER ...", help="image, text or both.")] = ("image", "text"),
    groups: Annotated[int, arg(metavar="N", help="Groups that the hidden units of a block are split into.")] = 8,
    device: Device = "auto",
    on_bad_sample: OnBad = "skip",
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Cut heads, MLP units and blocks of a trained dual encoder; distil the result from it by recipe 'inherited'."""
    from pocketvlm.distill.progress import Reporter, Stages
    from pocketvlm.distill.pruning import prune_to, summary

    scored = None if data is None else _open(data, on_bad_sample)
    with Stages(Reporter(), "pruning") as progress:
        result = prune_to(
            source, out, data=scored, method=method, keep_heads=keep_heads, keep_mlp=keep_mlp, keep_depth=keep_depth,
            towers=towers, groups=groups, device=device, overwrite=overwrite, allow_download=allow_download,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
    print(f"student: {out}\n{summary(result)}")


@app.command
def export(
    source: Annotated[Positional[str | None], arg(metavar="[SOURCE]", help="A run or student folder.")] = None,
    *,
    out: Out,
    from_: From = None,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
    targets: Annotated[
        tuple[str, ...],
        arg(metavar="TARGET ...", help="Any of onnx, executorch, coreml; 'onnx:int8' asks for one precision of it."),
    ] = ("onnx", "executorch", "coreml"),
    precisions: Annotated[
        tuple[str, ...] | None,
        arg(
            metavar="PRECISION ...",
            help="Any of fp32, fp16, w8, mixed, w8a8-dynamic, w8a8-static, int8, w4 and, for coreml, palette8, "
            "palette6, palette4; left out: fp32 and int8, for coreml fp16 and fp32.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        arg(metavar="SOURCE", help="Real inputs for quantized files; default: the training data of the run."),
    ] = None,
    finetune: Annotated[
        int | None,
        arg(metavar="STEPS", help="Fine-tune with fake quantization before int8 and w4 are written; 200 is usual."),
    ] = None,
    plan: Annotated[
        Path | None, arg(metavar="FILE", help="What stays in float where the precision is mixed: of 'quantize'.")
    ] = None,
    labels: Annotated[
        Path | None, arg(metavar="FILE", help="Bake these labels in, one a line: logits out, no text tower.")
    ] = None,
    templates: Annotated[
        tuple[str, ...], arg(metavar="TEMPLATE ...", help="Prompts for --labels, where {} stands for the label.")
    ] = ("{}",),
    optimum: Annotated[
        Path | None, arg(metavar="DIR", help="ONNX files that optimum made of the model --from; nothing is lowered.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Freeze a student into a bundle: model files per target and precision, tokenizer, conformance vectors."""
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.bundle import export_bundle, format_table, summarize
    from pocketvlm.export.labels import read_labels
    from pocketvlm.export.optimum_files import OptimumFiles

    if labels is None and templates != ("{}",):
        raise UsageError("--templates were given without --labels, whose prompts they are; give a file of labels too")
    if optimum is not None and (source, precisions, data, labels) != (None, None, None, None):
        raise UsageError("--optimum takes files as they are; with it give --from hf:DIR, --out and nothing to lower")
    bundle = export_bundle(
        _one_source("export", source, from_), out, targets if optimum is None else [OptimumFiles(optimum)],
        precisions, data, overwrite, plan=plan, finetune=finetune,
        labels=None if labels is None else read_labels(labels), templates=templates,
        allow_download=allow_download, trust_remote_code=trust_remote_code, processes=2, progress=Reporter().line,
    )  # fmt: skip
    print(f"{bundle}\n{format_table(summarize(bundle))}")


@reference_app.command(name="record")
def reference_record(
    source: Annotated[Positional[str | None], arg(metavar="[SOURCE]", help="A run or student folder.")] = None,
    *,
    data: Data,
    out: Out,
    from_: From = None,
    allow_download: AllowDownload = False,
    trust_remote_code: TrustRemoteCode = False,
    on_bad_sample: OnBad = "skip",
    device: Annotated[str, arg(help="auto, cpu (float64) or cuda (float32, TF32 off).")] = "auto",
    max_task: Annotated[int, arg(metavar="N", help="At most so many pictures in the task, chosen by a hash.")] = 512,
    overwrite: Overwrite = False,
) -> None:
    """Run the unpatched eager model once and keep everything that parity compares with."""
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.reference import record_reference, show

    chosen = _one_source("reference record", source, from_)
    recorded = record_reference(
        chosen,
        out,
        data=_open(data, on_bad_sample),
        device=device,
        overwrite=overwrite,
        max_task=max_task,
        allow_download=allow_download,
        trust_remote_code=trust_remote_code,
        progress=Reporter().line,
    )
    show(recorded)


@reference_app.command(name="show")
def reference_show(
    reference: Annotated[
        Positional[Path], arg(metavar="REFERENCE", help="A folder made by 'pocketvlm reference record'.")
    ],
    as_json: Json = False,
) -> None:
    """Print who recorded a reference, on what, and its noise floor."""
    from pocketvlm.export.reference import load_reference, show

    recorded = load_reference(reference)
    if as_json:
        _print(recorded.manifest, True)
    else:
        show(recorded)


cli_parity.register(app, reference_app)
cli_edge.register(app)


@app.command
def doctor(as_json: Json = False) -> None:
    """Say what this installation can do, and which extra brings what is missing."""
    from pocketvlm.listing import doctor_rows

    emit(doctor_rows(), as_json, title="doctor")


def _one_source(command: str, source: str | None, from_: str | None) -> str:
    """The model that a command takes, given as a run folder or by --from."""
    if (source is None) == (from_ is None):
        raise UsageError(
            f"{command} takes either a run folder or --from, not both or neither; see: pocketvlm {command} --help"
        )
    if from_ is None:
        return str(source)
    from pocketvlm.export.foreign import KINDS

    kind = from_.partition(":")[0]
    if kind not in KINDS:
        raise unknown_name("source of an existing model", kind, KINDS)
    return from_


def _open(spec: str, on_bad_sample: str) -> Any:
    """Open a data source; what was left out of it is said on stderr, so that --json stays JSON."""
    from pocketvlm.data import open_data
    from pocketvlm.distill.progress import Reporter, Stages

    with Stages(Reporter(), "data") as progress:
        source = open_data(spec, on_bad_sample=on_bad_sample, progress=progress)
    if source.report.counts:
        print(f"left out of {source.name}:\n{source.report.table()}", file=sys.stderr)
    return source


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, indent=2))
        return
    from rich.console import Console

    Console().print(value)


def _missing(error: ModuleNotFoundError) -> str:
    """Which extra brings the package that a command needs; an error of ours or of a package's inside is raised."""
    from pocketvlm.listing import extra_of

    package = (error.name or "").split(".")[0]
    extra = extra_of(package)
    if extra is None:
        raise error
    return (
        f"this command needs the package {package!r}, which the base install leaves out; "
        f"install it with: pip install 'pocketvlm[{extra}]'"
    )


def _fail(message: str, code: int = 2) -> NoReturn:
    if message:  # of several ranks that stop alike only the first speaks
        # messages of parsers that are quoted in ours may have several lines
        print(f"pocketvlm: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `pocketvlm`; a user's mistake prints one sentence and exits with 2."""
    call: Callable[..., Any] = app.cli
    # torch warns of torchao's enums at every import of it, and transformers of its own renamed arguments
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        call(prog="pocketvlm", args=argv, description=ABOUT, config=(tyro.conf.FlagCreatePairsOff,))
    except PocketvlmError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        _fail(_missing(error))
    except BrokenPipeError:
        # the reader of a pipe (head, less) has seen enough; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("pocketvlm: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
