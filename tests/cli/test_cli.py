"""The command line as a user meets it: help, results, machine-readable output, and one sentence for each mistake."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pocketvlm.edge.bundle import Bundle

Cli = Callable[..., Any]

COMMANDS = {
    "": (
        "demo",
        "list",
        "teacher",
        "distill",
        "report",
        "eval",
        "prune",
        "export",
        "reference",
        "parity",
        "embed",
        "classify",
        "conformance",
        "serve",
        "index",
        "search",
        "doctor",
        "cache-teacher",
        "cache",
        "bench",
        "matrix",
        "pick",
    ),
    "bench": (
        "BUNDLE",
        "--backends",
        "--precisions",
        "--towers",
        "--threads",
        "--rounds",
        "--runs",
        "--image",
        "--text",
        "--profile",
        "--out",
        "--overwrite",
        "--json",
    ),
    "index": ("DIR", "--model", "--out", "--dtype", "--dim", "--backend", "--precision", "--overwrite", "--json"),
    "search": ("DIR", "TEXT", "--image", "--model", "-k", "--where", "--open", "--sheet", "--json"),
    "matrix": ("--students", "--targets", "--precisions", "--data", "--out", "--retry", "--json"),
    "pick": (
        "--size-mb",
        "--latency-ms",
        "--target",
        "--precision",
        "--tower",
        "--table",
        "--measure",
        "--at-most",
        "--json",
    ),
    "cache-teacher": ("RECIPE", "KEY=VALUE", "--out", "--dtype", "--shard-size", "--by-shard"),
    "cache": ("show", "verify"),
    "cache show": ("DIR", "--json"),
    "cache verify": ("DIR", "--samples", "--seed", "--recipe", "--allow-download", "--trust-remote-code", "--json"),
    "demo": ("--out", "--quick", "--fold", "--overwrite"),
    "list": ("students", "teachers", "objectives", "data", "targets", "recipes", "--json"),
    "teacher": ("check",),
    "teacher check": (
        "TEACHER",
        "--data",
        "--on-bad-sample",
        "--device",
        "--allow-download",
        "--trust-remote-code",
        "--json",
    ),
    "distill": ("RECIPE", "KEY=VALUE", "--out", "--on-bad-sample", "--resume", "--overwrite"),
    "eval": (
        "MODEL",
        "--data",
        "--teacher",
        "--allow-download",
        "--trust-remote-code",
        "--on-bad-sample",
        "--backend",
        "--precision",
        "--json",
    ),
    "prune": (
        "SOURCE",
        "--data",
        "--method",
        "--keep-heads",
        "--keep-mlp",
        "--keep-depth",
        "--towers",
        "--groups",
        "--device",
        "--on-bad-sample",
        "--allow-download",
        "--trust-remote-code",
        "--overwrite",
    ),
    "export": (
        "SOURCE",
        "--out",
        "--from",
        "--allow-download",
        "--trust-remote-code",
        "--targets",
        "--precisions",
        "--data",
        "--overwrite",
    ),
    "reference": ("record", "show"),
    "reference record": (
        "SOURCE",
        "--data",
        "--out",
        "--from",
        "--allow-download",
        "--trust-remote-code",
        "--on-bad-sample",
        "--device",
        "--max-task",
        "--overwrite",
    ),
    "truncate": ("SOURCE", "--text-layers", "--dim", "--out", "--overwrite"),
    "reference show": ("REFERENCE", "--json"),
    "parity": ("BUNDLE", "--reference", "--out", "--targets", "--budgets", "--strict", "--overwrite", "--json"),
    "embed": ("BUNDLE", "INPUT", "--text", "--out", "--dim", "--overwrite", "--backend", "--precision", "--threads"),
    "classify": (
        *("BUNDLE", "IMAGE", "--labels", "--templates", "--examples", "--method", "--calibrate", "--threshold"),
        *("--save", "--load", "--overwrite", "--backend", "--precision", "--threads", "--json"),
    ),
    "serve": ("BUNDLE", "--host", "--port", "--workers", "--queue", "--backend", "--precision", "--threads"),
    "conformance": ("BUNDLE", "--backend", "--precision", "--threads", "--json"),
    "report": ("RUN", "--out", "--overwrite", "--json"),
    "doctor": ("--json",),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_argument_and_explains_it(cli: Cli, command: str) -> None:
    done = cli(*command.split(), "--help")
    assert done.code == 0
    assert done.err == ""
    for name in COMMANDS[command]:
        assert name in done.out, name
    offered = set(re.findall(r"^│ (--[a-z-]+)", done.out, re.MULTILINE)) - {"--help"}
    assert offered <= set(COMMANDS[command]), "this list lacks an option"


@pytest.mark.parametrize("what", ["students", "teachers", "objectives", "data", "targets", "recipes"])
def test_list_is_the_same_as_json_and_as_a_table(cli: Cli, what: str) -> None:
    rows = json.loads(cli("list", what, "--json").out)
    assert len(rows) >= 3
    shown = cli("list", what)
    assert shown.code == 0
    for row in rows:
        first = next(iter(row.values()))
        assert first in shown.out, "names are shown whole, so that they can be copied"
    if what == "students":
        smallest = rows[0]
        assert smallest["name"] == "mnv4-035"
        assert f"{smallest['image_params'] / 1e6:.1f} M" in shown.out
        assert f"{smallest['image_MACs'] / 1e6:.1f} M" in shown.out


def test_doctor_says_what_is_here_and_how_to_get_the_rest(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["part"]: row["state"] for row in json.loads(cli("doctor", "--json").out)}
    assert rows["onnxruntime"][0].isdigit()
    assert "onnxruntime" in cli("doctor").out
    monkeypatch.setitem(sys.modules, "coremltools", None)
    rows = {row["part"]: row["state"] for row in json.loads(cli("doctor", "--json").out)}
    assert rows["coremltools"] == "missing: pip install 'pocketvlm[coreml]'"


# --- edge commands --------------------------------------------------------------------------------------------------


def test_embed_prints_what_it_writes(cli: Cli, bundle: Path, colours: Path, edge_toys: Any, tmp_path: Path) -> None:
    pictures = [colours / "red.png", colours / "blue.png"]
    rows = [json.loads(line) for line in cli("embed", bundle, *pictures).out.splitlines()]
    assert [row["id"] for row in rows] == [str(path) for path in pictures]
    flat = np.zeros((2, 1, 1, 3), np.uint8)
    flat[0, ..., 0] = flat[1, ..., 2] = 255
    np.testing.assert_allclose([row["embedding"] for row in rows], edge_toys.expected_image(flat), atol=1e-6)
    out = tmp_path / "new" / "vectors.npy"
    done = cli("embed", bundle, *pictures, "--out", out)
    assert done.code == 0
    assert "tiny-0" in done.out, "the space is named, because only vectors of one space compare"
    np.testing.assert_allclose(np.load(out), [row["embedding"] for row in rows], atol=1e-6)
    before = out.read_bytes()
    assert "--overwrite" in cli("embed", bundle, pictures[0], "--out", out).sentence()
    assert out.read_bytes() == before
    assert cli("embed", bundle, pictures[0], "--out", out, "--overwrite").code == 0
    assert np.load(out).shape == (1, 4)
    # numpy would write x.npy and so lose one that is there
    assert ".npy" in cli("embed", bundle, pictures[0], "--out", out.with_suffix("")).sentence()


def test_embed_texts(cli: Cli, bundle: Path, edge_toys: Any) -> None:
    rows = [json.loads(line) for line in cli("embed", bundle, "red", "a picture of blue", "--text").out.splitlines()]
    assert [row["id"] for row in rows] == ["red", "a picture of blue"]
    ids = np.array([[2, 7, 3, 0, 0, 0], [2, 4, 5, 6, 9, 3]])
    np.testing.assert_allclose([row["embedding"] for row in rows], edge_toys.expected_text(ids), atol=1e-6)


def test_classify(cli: Cli, bundle: Path, colours: Path) -> None:
    pictures = [colours / "green.png", colours / "red.png"]
    labels = ("--labels", "red", "green", "blue")
    rows = json.loads(cli("classify", bundle, *pictures, *labels, "--json").out)
    assert [row["label"] for row in rows] == ["green", "red"]
    assert all(1 / 3 < row["probability"] <= 1 for row in rows)
    shown = cli("classify", bundle, *pictures, *labels, "--templates", "{}", "picture of {}")
    assert shown.code == 0
    assert "green" in shown.out
    assert "no image" in cli("classify", bundle, *labels).sentence()


def test_eval_of_a_bundle(cli: Cli, bundle: Path, colours: Path) -> None:
    values = json.loads(cli("eval", bundle, "--data", colours / "pairs.jsonl", "--json").out)
    assert values["data"]["pictures"] == 3
    assert values["model"]["image_to_text"]["R@1"] == 1.0
    shown = cli("eval", bundle, "--data", colours / "pairs.jsonl")
    assert shown.code == 0
    assert "R@1" in shown.out


def test_eval_counts_bad_samples_or_stops_at_them(cli: Cli, bundle: Path, colours: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(colours, tmp_path / "data"))
    with (folder / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"image": "none.png", "caption": "red"}) + "\n")
    command = ("eval", bundle, "--data", folder / "pairs.jsonl", "--json")
    done = cli(*command)
    assert done.code == 0
    assert json.loads(done.out)["data"]["pictures"] == 3
    assert re.search(r"missing-file +1", done.err)
    refused = cli(*command, "--on-bad-sample", "refuse").sentence()
    assert "pairs.jsonl:4" in refused
    assert "none.png" in refused


WITHOUT_TORCH = """
import sys

ABSENT = ("torch", "torchvision", "timm", "transformers", "pydantic", "yaml", "onnx")

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
from pocketvlm.cli import main
main(sys.argv[1:])
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_edge_commands_run_on_the_base_install(
    bundle: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))
    commands: list[tuple[object, ...]] = [
        ("embed", bundle, colours / "red.png"),
        ("embed", bundle, "red", "--text"),
        ("classify", bundle, colours / "red.png", "--labels", "red", "blue", "--json"),
        ("search", colours, "red", "--model", bundle),
        ("list", "data", "--json"),
        ("list", "teachers", "--json"),
        ("doctor", "--json"),
    ]
    for command in commands:
        done = without_torch(*command)
        assert done.returncode == 0, done.stderr
    assert "pip install 'pocketvlm[distill]'" in done.stdout


@pytest.mark.parametrize("command", ["distill quick --out OUT", "list students", "export run --out OUT"])
def test_other_commands_name_the_extra_that_they_need(command: str, tmp_path: Path) -> None:
    done = without_torch(*command.replace("OUT", str(tmp_path / "out")).split())
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'pocketvlm[distill]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_early_is_no_error() -> None:
    script = f"{sys.executable} -m pocketvlm.cli list data --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# --- export, reference, parity --------------------------------------------------------------------------------------


def test_export_writes_a_bundle_and_keeps_what_is_there(
    cli: Cli, student: Path, exported: Path, tmp_path: Path
) -> None:
    names = {path.name for path in exported.rglob("*") if path.is_file()}
    assert {"bundle.json", "tokenizer.json", "vectors.json"} <= names
    out = Path(shutil.copytree(exported, tmp_path / "bundle"))
    (out / "bundle.json").write_text("{}")
    command = ("export", student, "--out", out, "--targets", "onnx", "--precisions", "fp32")
    assert "--overwrite" in cli(*command).sentence()
    assert (out / "bundle.json").read_text() == "{}"
    done = cli(*command, "--overwrite")
    assert done.code == 0, done.err
    assert re.search(r"onnx +fp32 ", done.out)
    assert json.loads((out / "bundle.json").read_text())["variants"][0]["target"] == "onnx"
    rows = [json.loads(line) for line in cli("embed", out, "a red circle", "--text").out.splitlines()]
    assert len(rows[0]["embedding"]) == 32


def test_conformance_prints_its_stages_and_the_first_that_fails(cli: Cli, exported: Path, tmp_path: Path) -> None:
    done = cli("conformance", exported, "--precision", "fp32")
    assert done.code == 0, done.out
    assert re.search(r"S5 retrieval +pass", done.out)
    assert done.out.rstrip().endswith("every stage passed")
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    vectors = json.loads((changed / "conformance/vectors.json").read_text())
    vectors["texts"][0]["ids"][1] += 1
    text = json.dumps(vectors)
    (changed / "conformance/vectors.json").write_text(text)
    assert "was changed" in cli("conformance", changed).sentence()
    manifest = json.loads((changed / "bundle.json").read_text())
    manifest["files"]["conformance/vectors.json"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (changed / "bundle.json").write_text(json.dumps(manifest))
    done = cli("conformance", changed)
    assert done.code == 1
    assert "first failing stage: S1 ids" in done.out
    found = json.loads(cli("conformance", changed, "--json").out)
    assert (found["passed"], found["first_failing"]) == (False, "S1 ids")


def test_reference_is_recorded_once_and_shown(
    cli: Cli, student: Path, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    manifest = json.loads(cli("reference", "show", reference, "--json").out)
    assert manifest["numerics"]["dtype"] == "float64"
    shown = cli("reference", "show", reference)
    assert shown.code == 0
    assert "float64" in shown.out
    command = ("reference", "record", student, "--data", shapes, "--out", reference, "--device", "cpu")
    assert "--overwrite" in cli(*command).sentence()


def test_parity_passes_and_one_changed_byte_fails(cli: Cli, exported: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    own = Path(shutil.copytree(exported, tmp_path / "own"))
    done = cli("parity", own, "--reference", reference, "--out", out, "--into-bundle")
    assert done.code == 0, done.out
    assert json.loads((out / "parity.json").read_text())["variants"][0]["status"] in ("pass", "undecided")
    assert (out / "parity.html").is_file()
    assert {(entry["target"], entry["precision"]) for entry in Bundle.load(own).parity} == {
        (variant.target, variant.precision) for variant in Bundle.load(own).variants
    }
    assert "--overwrite" in cli("parity", exported, "--reference", reference, "--out", out).sentence()
    bad = Path(shutil.copytree(exported, tmp_path / "bad"))
    file = next(bad.rglob("*image*.onnx"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = cli("parity", bad, "--reference", reference, "--out", out, "--overwrite")
    assert done.code == 1
    assert file.name in " ".join(done.out.split())
    done = cli("parity", bad, "--reference", reference, "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert report["status"] == "fail"
    assert file.name in report["message"]
    assert file.name in cli("embed", bad, "a red circle", "--text").sentence()


def test_somebody_elses_model_is_exported_recorded_and_held_to_upstream(
    cli: Cli, upstream: str, shapes: Path, tmp_path: Path
) -> None:
    bundle, reference, out = tmp_path / "bundle", tmp_path / "reference", tmp_path / "report"
    done = cli("export", "--from", upstream, "--targets", "onnx:fp32", "--out", bundle)
    assert done.code == 0, done.err
    done = cli("reference", "record", "--from", upstream, "--data", shapes, "--out", reference, "--device", "cpu")
    assert done.code == 0, done.err
    assert "CLIPModel" in done.out
    done = cli("parity", bundle, "--reference", reference, "--out", out)
    assert done.code == 0, done.out
    assert "not compared: S0" in " ".join(done.out.split())
    (variant,) = json.loads((out / "parity.json").read_text())["variants"]
    assert variant["status"] == "pass"
    assert {stage["stage"]: stage["status"] for stage in variant["stages"]}["S0"] == "not-compared"
    both = ("reference", "record", "somewhere", "--from", upstream, "--data", shapes, "--out", tmp_path / "none")
    assert "not both or neither" in cli(*both).sentence()


def test_parity_by_a_budgets_file_of_ones_own(cli: Cli, exported: Path, reference: Path, tmp_path: Path) -> None:
    from importlib import resources

    text = resources.files("pocketvlm.export").joinpath("budgets.json").read_text("utf-8")
    value, mine, out = json.loads(text), tmp_path / "mine.json", tmp_path / "report"
    command = ("parity", exported, "--reference", reference, "--budgets", mine)
    assert "mine.json" in cli(*command).sentence()
    value["version"] = "mine-1"
    value["precisions"]["fp32"]["metrics"]["sqnr_db"]["value"] = 290
    mine.write_text(json.dumps(value))
    done = cli(*command, "--out", out)
    assert done.code == 1
    said = " ".join(done.out.split())
    assert "the budget is 2" in said
    assert "mine.json mine-1 (your own)" in said
    report = json.loads((out / "parity.json").read_text())
    assert (report["budgets"]["file"], report["budgets"]["whose"]) == ("mine.json", "your own")
    assert "mine-1 (your own)" in (out / "parity.html").read_text()
    value["precisions"]["fp32"]["metrics"]["sqnr_db"]["vallue"] = 1
    mine.write_text(json.dumps(value))
    assert "did you mean 'value'" in cli(*command).sentence()


@pytest.mark.parametrize(
    "given", [(), ("allow_download",), ("trust_remote_code",), ("allow_download", "trust_remote_code")]
)
def test_permissions_reach_the_teacher_and_are_off_unless_given(
    cli: Cli,
    given: tuple[str, ...],
    exported: Path,
    recipe: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pocketvlm.teachers
    from pocketvlm.edge.errors import UsageError

    seen: list[dict[str, bool]] = []

    def load(spec: str, **options: Any) -> None:
        seen.append({key: options.get(key, False) for key in ("allow_download", "trust_remote_code")})
        raise UsageError(f"{spec} stops here")

    monkeypatch.setattr(pocketvlm.teachers, "load_teacher", load)
    model, flags = "hf:some/model", ["--" + name.replace("_", "-") for name in given]
    out = ("--out", tmp_path / "out")
    commands: list[tuple[object, ...]] = [
        ("teacher", "check", model, "--data", shapes, *flags),
        ("eval", exported, "--data", shapes, "--teacher", model, *flags),
        ("export", "--from", model, "--targets", "onnx:fp32", *out, *flags),
        ("reference", "record", "--from", model, "--data", shapes, *out, *flags),
        ("prune", model, "--keep-depth", "0.5", *out, *flags),
        ("distill", recipe, f"teacher.spec={model}", *(f"teacher.{name}=true" for name in given), *out),
    ]
    for command in commands:
        assert "stops here" in cli(*command).err.splitlines()[-1], command
    assert seen == [{name: name in given for name in ("allow_download", "trust_remote_code")}] * len(commands)


# --- prune ----------------------------------------------------------------------------------------------------------


def test_prune_writes_a_student_and_keeps_what_is_there(cli: Cli, student: Path, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    command = ("prune", student, "--data", shapes, "--towers", "text", "--keep-mlp", "0.5", "--out", out)
    done = cli(*command, "--device", "cpu")
    assert done.code == 0, done.err
    assert f"student: {out}" in done.out
    assert "text: 0." in done.out
    assert "score: " in done.out
    described = json.loads((out / "pruning.json").read_text())
    assert described["method"] == "mope"
    assert described["parameters"]["after"]["text"] < described["parameters"]["before"]["text"]
    assert (out / "student.json").is_file()
    assert "--overwrite" in cli(*command).sentence()


# --- distill --------------------------------------------------------------------------------------------------------


def test_distill_resume_and_overwrite(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("no run")
    assert "--resume" in cli("distill", recipe, "--out", other, "--resume").sentence()
    done = cli("distill", recipe, "--out", out)
    assert done.code == 0, done.err
    assert str(out / "student") in done.out
    assert str(out / "report.html") in done.out
    first = (out / "metrics.jsonl").read_text()
    refused = cli("distill", recipe, "--out", out).sentence()
    assert "--overwrite" in refused
    assert "--resume" in refused
    assert (out / "metrics.jsonl").read_text() == first
    assert "train.steps" in cli("distill", recipe, "train.steps=3", "--out", out, "--resume").sentence()
    assert "one of them" in cli("distill", recipe, "--out", out, "--resume", "--overwrite").sentence()
    # the last step again, from the checkpoint before it
    for path in (out / "checkpoints").glob("*2.*"):
        path.unlink()
    assert cli("distill", recipe, "--out", out, "--resume").code == 0
    again = (out / "metrics.jsonl").read_text()
    losses = [[row["loss"] for row in map(json.loads, text.splitlines()) if "loss" in row] for text in (first, again)]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert cli("distill", recipe, "train.steps=1", "--out", out, "--overwrite").code == 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["train"]["steps"] == 1


def test_truncate_cuts_out_what_is_promised(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    run, small = tmp_path / "run", tmp_path / "small"
    nested = "objectives=[{name: matryoshka, options: {inner: {name: clip}, dims: [4, 16]}}]"
    assert cli("distill", recipe, nested, "student.overrides.dims=[4]", "--out", run).code == 0
    assert "take one of" in cli("truncate", run, "--dim", 5, "--out", small).sentence()
    assert not small.exists()
    done = cli("truncate", run, "--dim", 4, "--out", small)
    assert done.code == 0, done.err
    assert str(small / "student") in done.out
    assert json.loads((small / "student" / "student.json").read_text())["contract"]["embed_dim"] == 4
    assert (small / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    assert "--overwrite" in cli("truncate", run, "--dim", 4, "--out", small).sentence()
    assert cli("truncate", run, "--dim", 4, "--out", small, "--overwrite").code == 0


def test_a_changed_checkpoint_is_refused(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert cli("distill", recipe, "train.steps=1", "--out", out).code == 0
    file = max((out / "checkpoints").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = cli("distill", recipe, "train.steps=1", "--out", out, "--resume")
    assert done.code == 2
    assert file.name in done.err.splitlines()[-1]


def test_distill_stops_at_a_bad_sample_when_told_to(cli: Cli, recipe: Path, shapes: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shapes.parent, tmp_path / "data"))
    with (folder / "shapes.jsonl").open("a") as file:
        file.write(json.dumps({"image": "0.png", "caption": ["a circle " * 20]}) + "\n")
        file.write(json.dumps({"image": "1.png", "caption": 7}) + "\n")
    data = f"data.train={folder / 'shapes.jsonl'}"
    done = cli("distill", recipe, data, "train.steps=1", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    said = done.out + done.err
    assert "too-long-text" in said
    assert "not-a-string" in said
    done = cli("distill", recipe, data, "--on-bad-sample", "refuse", "--out", tmp_path / "other")
    assert done.code == 2
    assert "--on-bad-sample skip" in done.err.splitlines()[-1]


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", "did you mean 'steps'"),
        ("student.name=mnv4-36", "'mnv4-035'"),
        ("teacher.spec=openmojilit", "'openmoji-lit'"),
        ("data.train=openmojy", "did you mean 'openmoji'"),
        ("objectives.0.name=clipp", "did you mean 'clip'"),
    ],
)
def test_a_misspelt_recipe_is_one_sentence_and_leaves_no_folder(
    cli: Cli, recipe: Path, tmp_path: Path, override: str, expected: str
) -> None:
    done = cli("distill", recipe, override, "--out", tmp_path / "out")
    assert expected in done.sentence()
    assert not (tmp_path / "out").exists()


def test_names_and_paths_that_do_not_exist(cli: Cli, bundle: Path, student: Path, shapes: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    mistakes: list[tuple[tuple[object, ...], str]] = [
        (("distill", "quik", *out), "did you mean 'quick'"),
        (("distill", tmp_path / "no.yaml", *out), "no.yaml"),
        (("teacher", "check", "openmojilit", "--data", shapes), "did you mean 'openmoji-lit'"),
        (("teacher", "check", "ingredients", "--data", "openmojy"), "did you mean 'openmoji'"),
        (("eval", bundle, "--data", "openmojy"), "did you mean 'openmoji'"),
        (("eval", tmp_path, "--data", shapes), "neither bundle.json nor student.json"),
        (("prune", student, "--method", "mop", "--keep-depth", "0.5", *out), "did you mean 'mope'"),
        (("prune", student, "--method", "prefix", "--keep-depth", "0.5", *out), "not made of plain transformer blocks"),
        (("prune", student, "--method", "prefix", "--keep-heads", "0", *out), "keep_heads is 0"),
        (("prune", tmp_path / "none", "--keep-heads", "0.5", *out), "student.json"),
        (("export", *out), "--from"),
        (("export", student, "--from", "hf:x", *out), "--from"),
        (("export", student, "--targets", "onxx", *out), "did you mean 'onnx'"),
        (("export", tmp_path / "none", "--targets", "onnx:fp32", *out), "not a folder"),
        (("reference", "record", tmp_path, "--data", shapes, *out), "student.json"),
        (("reference", "record", "--data", shapes, *out), "--from"),
        (("reference", "record", "--from", "hff:x", "--data", shapes, *out), "did you mean 'hf'"),
        (("reference", "show", tmp_path), "manifest.json"),
        (("embed", tmp_path / "none", "a.png"), "does not exist"),
        (("embed", bundle), "nothing to embed"),
        (("embed", bundle, tmp_path / "none.png"), "none.png"),
        (("embed", bundle, "", "--text"), "nothing to encode"),
        (("embed", bundle, "red", "--text", "--precision", "int8"), "int8"),
        (("classify", bundle, tmp_path / "none.png", "--labels", "red"), "none.png"),
    ]
    for command, expected in mistakes:
        sentence = cli(*command).sentence()
        assert expected in sentence, (command, sentence)
    assert not (tmp_path / "out").exists()


def test_a_yaml_error_is_still_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("train: {steps: 3\ndata: [\n")
    assert "broken.yaml" in cli("distill", tmp_path / "broken.yaml", "--out", tmp_path / "out").sentence()


def test_what_the_system_refuses_is_one_sentence_too(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = cli("embed", bundle, "red", "--text", "--out", tmp_path / "file" / "x.npy").sentence()
    assert str(tmp_path / "file") in sentence


def test_an_argument_that_is_missing_is_named(cli: Cli) -> None:
    done = cli("distill", "quick")
    assert done.code == 2
    assert "--out" in done.err
    assert cli("list", "studnts").code == 2
    assert cli().code == 2
