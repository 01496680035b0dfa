"""Sizes of students: parameters and multiply-accumulates of what runs on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pocketvlm.edge.contract import TextSpec
from pocketvlm.students.build import seeded
from pocketvlm.students.config import StudentConfig, load_config, student_names
from pocketvlm.students.deploy import DeployTower, fuse_branches
from pocketvlm.students.image import build_image_tower
from pocketvlm.students.text import TextTower


@dataclass(frozen=True)
class StudentInfo:
    """Size of one student. params: weights of the deployed (fused) towers, projections included. macs: multiply-
    accumulates of one picture or one text of full context length, see `count_macs`."""

    name: str
    image_params: int
    text_params: int
    image_macs: int
    text_macs: int
    description: str


def count_macs(module: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one forward: half of `torch.utils.flop_counter`'s count.

    Convention: convolutions, linear layers and matrix products only; norms, activations, pooling, softmax, lookups and
    additions count nothing, and a bias is free. This is what fvcore and the model papers print as "FLOPs" or "MACs".
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example)
    return counter.get_total_flops() // 2


def describe(config: StudentConfig, *, embed_dim: int = 384) -> StudentInfo:
    """Size of a configuration with the vocabulary it asks for, built with random weights."""
    with seeded(0, "info"):
        tower = build_image_tower(config.image, embed_dim, load_weights=False)
        fuse_branches(tower)
        spec = TextSpec(context_length=config.text.context_length, vocab_size=config.text.vocab_size)
        image, text = DeployTower(tower).eval(), DeployTower(TextTower(config.text, spec, embed_dim)).eval()
    pixels = torch.zeros(1, config.image.size, config.image.size, 3, dtype=torch.uint8)
    return StudentInfo(
        name=config.name,
        image_params=_params(image),
        text_params=_params(text),
        image_macs=count_macs(image, pixels),
        text_macs=count_macs(text, torch.ones(1, spec.context_length, dtype=torch.int32)),
        description=config.description,
    )


def list_students(*, embed_dim: int = 384) -> list[StudentInfo]:
    """Every shipped student, smallest first. embed_dim: width of the joint space that the projections lead to."""
    # single pictures through small layers: with several threads a busy machine takes ten times longer
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [describe(load_config(name), embed_dim=embed_dim) for name in student_names()]
    finally:
        torch.set_num_threads(threads)
    return sorted(found, key=lambda info: info.image_params + info.text_params)


def _params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
