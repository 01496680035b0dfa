"""Build a named student, with weights that depend on the seed and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.config import StudentConfig, load_config
from pocketvlm.students.image import build_image_tower, image_spec
from pocketvlm.students.inherit import inherit_weights
from pocketvlm.students.student import Student
from pocketvlm.students.task import Classes, ClassHeads
from pocketvlm.students.text import TextTower
from pocketvlm.students.tokenizer import read_tokenizer, text_spec


def build_student(
    name: str | StudentConfig,
    *,
    embed_dim: int,
    tokenizer_json: bytes | str | Path,
    seed: int = 0,
    space_id: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    classes: Classes | None = None,
) -> Student:
    """A new student in training mode, float32, on the CPU.

    Args:
        name: a shipped student, "timm:MODEL", a .yaml file, or an already checked configuration.
        embed_dim: width of the joint space (the teacher's, when it is to be matched).
        tokenizer_json: a `tokenizers` file (path, or its bytes), as `train_tokenizer` makes it. Its vocabulary decides
            the size of the token embedding.
        seed: equal seeds give equal weights whatever the global generators hold, and leave those untouched. Each tower
            has a stream of its own: changing the text tower leaves the image tower's start as it was.
        space_id: the teacher's, for a student trained to reproduce its embeddings; None = the student's own.
        overrides: values that replace the configuration's, dotted or nested.
        classes: give it class heads for these, which makes it a task student; see `students.task`.

    Raises:
        UnknownNameError: unknown student or timm model. UsageError: a configuration that cannot work.
        MissingExtraError: the package that holds the pretrained weights is absent.
    """
    if isinstance(name, StudentConfig):
        if overrides:
            raise UsageError(
                "overrides were given beside a checked StudentConfig; pass the student's name, or no overrides"
            )
        config = name
    else:
        config = load_config(name, overrides)
    return assemble(config, embed_dim, read_tokenizer(tokenizer_json), seed=seed, space_id=space_id, classes=classes)


def assemble(
    config: StudentConfig,
    embed_dim: int,
    tokenizer_json: bytes,
    *,
    seed: int,
    space_id: str | None,
    classes: Classes | None = None,
    load_weights: bool = True,
) -> Student:
    """`build_student` after its inputs were read; load_weights=False when a state dict follows."""
    if embed_dim < 1:
        raise UsageError(f"embed_dim {embed_dim} leaves no embedding; give the width of the joint space, 1 or more")
    if config.dims and config.dims[-1] > embed_dim:
        raise UsageError(
            f"student {config.name!r} promises a prefix of {config.dims[-1]} numbers (dims) but its embedding has "
            f"{embed_dim}; there is nothing to cut, so give dims up to {embed_dim}"
        )
    if wide := [list(pair) for pair in config.exits if pair[1] > embed_dim]:
        raise UsageError(
            f"student {config.name!r} promises the smaller students {wide} (exits) but its embedding has {embed_dim} "
            f"numbers; there is nothing to cut, so give exits up to {embed_dim}"
        )
    for part, tower in (("image", config.image), ("text", config.text)):
        if load_weights and tower.blocks and tower.weights != "none":
            raise UsageError(
                f"{part}.blocks describes a pruned tower and {part}.weights {tower.weights!r} fit the whole one; the "
                f"kept parts would get other weights, so load the pruned student itself or set {part}.weights to 'none'"
            )
    spec = text_spec(config.text, tokenizer_json)
    with seeded(seed, "image"):
        image = build_image_tower(config.image, embed_dim, load_weights=load_weights)
    with seeded(seed, "text"):
        text = TextTower(config.text, spec, embed_dim)
    if load_weights and config.text.weights != "none":
        inherit_weights(text, config.text, tokenizer_json)
    return Student(
        config=config,
        image_tower=image,
        text_tower=text,
        image_spec=image_spec(config.image),
        text_spec=spec,
        tokenizer_json=tokenizer_json,
        embed_dim=embed_dim,
        space_id=space_id,
        heads=None if classes is None else ClassHeads(sum(image.widths), classes),
    )


@contextmanager
def seeded(seed: int, part: str) -> Iterator[None]:
    """Draw initial weights on the CPU from a stream named by (seed, part); the global generator is put back."""
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # not torch.manual_seed: that one would reseed the accelerators' generators too
        torch.default_generator.manual_seed(stream)
        yield
