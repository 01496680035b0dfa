from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.teachers import list_teachers, load_teacher


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openmoji-lite", "did you mean 'openmoji-lit'"),
        ("openclip:ViT-B-32@x", "open_clip"),
        ("nothing", "known: embeddings"),
        ("hf:a/b?fold=1", "option of teacher hf 'fold'"),
        ("hf-text:a/b?poolin=last", "did you mean 'pooling'"),
        ("hf-text:a/b?pooling=max", "unknown pooling 'max'"),
    ],
)
def test_unknown_names_are_suggested(spec: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_teacher(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openmoji-lit?fold=x", "openmoji-lit"),
        ("openmoji-lit:0", "openmoji-lit"),
        ("minilm:small", "write minilm, which takes no folder"),
        ("hf-text", "does not say which one"),
        ("hf-text:./nowhere", "is neither a folder here nor a hub id"),
        ("openmoji-lit?fold", "key=value"),
        ("hf:", "does not say which one"),
        ("open_clip", "does not say which one"),
        ("embeddings:nowhere", "is not a teacher cache"),
    ],
)
def test_malformed_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_teacher(spec)


def test_list_names_every_kind() -> None:
    infos = list_teachers()
    assert [i.kind for i in infos] == [
        "openmoji-lit",
        "ingredients",
        "open_clip",
        "hf",
        "embeddings",
        "minilm",
        "hf-text",
    ]
    assert all(i.spec.startswith(i.kind) and i.description and i.extra for i in infos)


def test_importing_the_room_is_light() -> None:
    code = (
        "import sys, pocketvlm.teachers as t; t.list_teachers(); "
        "print([m for m in ('torch', 'timm', 'open_clip', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_bare_name_is_refused() -> None:
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import teachers"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "import this package as pocketvlm.teachers" in out.stderr
