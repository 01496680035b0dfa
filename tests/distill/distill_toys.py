"""A world small enough to learn in seconds: pictures of one colour, and a teacher that knows every colour's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pocketvlm.edge.contract import ImageSpec, identity
from pocketvlm.teachers.base import TeacherOutput, TextTeacher

_WORDS = (
    "amber azure beige black blue bronze brown coral crimson cyan gold gray green indigo ivory jade khaki lemon "
    "lilac lime magenta maroon mint navy ochre olive orange peach pink plum purple red rose ruby rust salmon sand "
    "scarlet silver teal"
)
NAMES = _WORDS.split()
DIM, FEATURES = 16, 12


def colour(name: str) -> np.ndarray[Any, Any]:
    """Three numbers in 0..1 that a name stands for, the same everywhere."""
    return np.frombuffer(hashlib.sha256(name.encode()).digest()[:3], np.uint8) / 255


def make_world(folder: Path, *, captioned: float = 1.0, pictures: int = len(NAMES), broken: bool = False) -> Path:
    """A manifest of one-colour pictures named 'NAME thing'; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(NAMES[:pictures]):
        noise = rng.normal(0, 6, (40, 48, 3))
        pixels = np.clip(colour(name) * 255 + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        row: dict[str, Any] = {"image": f"{name}.png", "label": name}
        if index < captioned * pictures:
            row["caption"] = f"{name} thing"
        rows.append(row)
    if broken:
        (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
        rows.append({"image": "broken.jpg", "caption": "nothing at all"})
    path = folder / "world.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class ToyTeacher:
    """Embeds a picture by its mean colour and a text by the colour of its first word."""

    name = "toy"
    fingerprint = hashlib.sha256(b"toy teacher 1").hexdigest()
    space_id = identity("toy", fingerprint)
    dim = DIM
    logit_scale = 20.0
    logit_bias = 0.0
    image = ImageSpec(size=16)
    licences = (("toy teacher", "CC0-1.0", "nobody"),)

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.joint = torch.from_numpy(rng.normal(size=(3, DIM))).float()
        self.wide = torch.from_numpy(rng.normal(size=(3, FEATURES))).float()

    def encode_images(self, pixels: torch.Tensor) -> TeacherOutput:
        return self._out(pixels.float().mean(dim=(1, 2)) / 255)

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        rows = [colour(text.split()[0]) if text.split() else np.zeros(3) for text in texts]
        return self._out(torch.from_numpy(np.stack(rows)).float())

    def _out(self, rgb: torch.Tensor) -> TeacherOutput:
        centred = rgb - 0.5
        return TeacherOutput(torch.nn.functional.normalize(centred @ self.joint, dim=-1), centred @ self.wide)


class ToyTokenTeacher(ToyTeacher):
    """Shows the mean colours of sixteen cells too, in twelve made-up numbers."""

    name = "toy-tokens"
    fingerprint = hashlib.sha256(b"toy token teacher 1").hexdigest()

    def encode_image_tokens(self, pixels: torch.Tensor) -> TeacherOutput:
        cells = pixels.float().unflatten(1, (4, 4)).unflatten(3, (4, 4)).mean(dim=(2, 4)).flatten(1, 2) / 255
        found = self.encode_images(pixels)
        return TeacherOutput(found.embedding, found.features, {"tokens": (cells - 0.5) @ self.wide})


class ToyOtherTeacher(ToyTeacher):
    """Sees smaller pictures, in a narrower space of its own, at another scale, and shows no pooled features."""

    name = "toy-other"
    fingerprint = hashlib.sha256(b"toy other teacher 1").hexdigest()
    space_id = identity("toy-other", fingerprint)
    dim = 10
    logit_scale = 5.0
    image = ImageSpec(size=8)

    def __init__(self) -> None:
        super().__init__()
        self.joint = torch.from_numpy(np.random.default_rng(8).normal(size=(3, self.dim))).float()

    def _out(self, rgb: torch.Tensor) -> TeacherOutput:
        return TeacherOutput(super()._out(rgb).embedding)


class ToyTextTeacher(TextTeacher):
    """Knows the colours' names and has never seen one."""

    name = "toy-text"
    fingerprint = hashlib.sha256(b"toy text teacher 1").hexdigest()
    space_id = identity("toy-text", fingerprint)
    dim = 6
    licences = (("toy text teacher", "CC0-1.0", "nobody"),)

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        rows = [np.cos(np.outer(colour((text.split() or ["-"])[0]), [3.0, 5.0])).ravel() for text in texts]
        return TeacherOutput(torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)).float(), dim=-1))


TOYS = {cls.name: cls for cls in (ToyTeacher, ToyTokenTeacher, ToyOtherTeacher, ToyTextTeacher)}

TINY_STUDENT = {
    "image": {"backbone": "mobilenetv4_conv_small_035", "size": 32},
    "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 300},
}


def toy_recipe(world: Path, cache: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over the toy world; `changes` replace whole sections."""
    value: dict[str, Any] = {
        "name": "toy",
        "data": {
            "train": f"{world}?check=none",
            "eval": f"{world}?check=none",
            "words": {"name": "wordfreq-en", "size": 60},
        },
        "views": {"count": 3},
        "teacher": {"spec": "toy", "cache": str(cache)},
        "student": {"name": "mnv4-035", "overrides": TINY_STUDENT},
        "objectives": [
            {"name": "feature", "options": {"distance": "cosine"}},
            {"name": "hint", "weight": 0.1},
            {"name": "crd"},
            {"name": "bank", "weight": 0.5},
            {"name": "feature", "batch": "texts", "options": {"text": 0}},
        ],
        "train": {"steps": 8, "batch_size": 8, "text_batch": 16, "warmup_steps": 2, "log_every": 4, "threads": 1},
        "checkpoint": {"every": 4},
    }
    return value | changes


def use_toy_teacher(monkeypatch: Any = None) -> None:
    """Let `load_teacher` give the toy teachers of `TOYS`, "toy" for any other name; for good without a monkeypatch."""
    import pocketvlm.teachers

    real = pocketvlm.teachers.load_teacher

    def load(spec: str, **options: Any) -> Any:
        if spec.startswith("embeddings:"):
            return real(spec, **options)
        return TOYS.get(spec, ToyTeacher)()

    if monkeypatch is None:
        pocketvlm.teachers.load_teacher = load  # type: ignore[attr-defined,assignment]
    else:
        monkeypatch.setattr(pocketvlm.teachers, "load_teacher", load, raising=False)
