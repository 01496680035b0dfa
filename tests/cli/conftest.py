"""What the command line is tried on: a bundle made by hand, a minute student, its export and its reference run."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image

from pocketvlm.cli import main
from pocketvlm.students import save_student

TESTS = Path(__file__).resolve().parents[1]


def _load(path: Path) -> Any:
    # the toys of other rooms; pytest's importlib mode gives test files no package to import them from
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Done(NamedTuple):
    code: int
    out: str
    err: str

    def sentence(self, *, after: Sequence[str] = ()) -> str:
        """The one line on stderr that a user's mistake is answered with; after: lines of progress before it."""
        assert self.code == 2, (self.code, self.out, self.err)
        *before, last = self.err.splitlines()
        assert before == list(after), self.err
        assert last.startswith("pocketvlm: ")
        assert "Traceback" not in self.err
        return last


def exit_code(*arguments: object) -> int:
    """Run the command line in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = exit_code(*arguments)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def edge_toys() -> Any:
    return _load(TESTS / "edge" / "conftest.py")


@pytest.fixture(scope="session")
def vlm_toys() -> Any:
    return _load(TESTS / "distill" / "vlm_toys.py")


@pytest.fixture(scope="session")
def hf_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random LLaVA of a few thousand weights."""
    return _load(TESTS / "teachers" / "hf_vlm_toys.py").save_toy("llava", tmp_path_factory.mktemp("hf") / "llava")


@pytest.fixture(scope="session")
def bundle(edge_toys: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hand-made bundle: mean colours and colour words. Read only."""
    return edge_toys.write_bundle(tmp_path_factory.mktemp("hand") / "bundle")


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """red.png, green.png, blue.png and a manifest of them, pairs.jsonl."""
    folder = tmp_path_factory.mktemp("colours")
    rows = []
    for index, name in enumerate(("red", "green", "blue")):
        colour = [0, 0, 0]
        colour[index] = 255
        Image.new("RGB", (12, 10), tuple(colour)).save(folder / f"{name}.png")
        rows.append({"image": f"{name}.png", "caption": f"picture of {name}", "label": name})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def parity_toys() -> Any:
    return _load(TESTS / "export" / "toy_parity.py")


@pytest.fixture(scope="session")
def shapes(parity_toys: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 40 pictures of coloured shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for index, sample in enumerate(parity_toys.toy_data().samples):
        (folder / f"{index}.png").write_bytes(sample.image.data)
        rows.append({"image": f"{index}.png", "caption": sample.captions[0].text, "label": sample.label})
    path = folder / "shapes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def student(parity_toys: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(parity_toys.toy_student(), tmp_path_factory.mktemp("student") / "student")


@pytest.fixture(scope="session")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pocketvlm export` writes of the student. Read only."""
    out = tmp_path_factory.mktemp("export") / "bundle"
    assert exit_code("export", student, "--out", out, "--targets", "onnx:fp32") == 0
    return out


@pytest.fixture(scope="session")
def reference(student: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pocketvlm reference record` writes of the student. Read only."""
    out = tmp_path_factory.mktemp("reference") / "run"
    assert exit_code("reference", "record", student, "--data", shapes, "--out", out, "--device", "cpu") == 0
    return out


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec of a minute CLIP that transformers saved."""
    return _load(TESTS / "export" / "test_foreign.py").save_hf(tmp_path_factory.mktemp("upstream"), "hf_clip").spec


@pytest.fixture
def recipe(shapes: Path, tmp_path: Path) -> Path:
    """Two steps without a teacher, on the coloured shapes; about half a second."""
    value = {
        "name": "tiny",
        "data": {"train": str(shapes), "eval": str(shapes)},
        "views": {"count": 1},
        "student": {
            "name": "mnv4-035",
            "embed_dim": 16,
            "overrides": {
                "image": {"backbone": "test_efficientnet", "size": 32},
                "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 12, "vocab_size": 200},
            },
        },
        "objectives": [{"name": "clip"}],
        "train": {"steps": 2, "batch_size": 8, "warmup_steps": 1, "log_every": 1, "threads": 1},
        "checkpoint": {"every": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(value))
    return path
