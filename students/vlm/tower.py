"""The image tower of a saved CLIP student as what a generative student sees with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students.image import pretrained_cfg
from pocketvlm.students.io import load_student, saved_config
from pocketvlm.students.vlm.config import STUDENT, VisionConfig, VlmConfig

_TRUNK = "trunk."


class StudentTower(NamedTuple):
    """config: with everything that follows from the student. trunk: the weights of its timm model. licences: rows
    (what, licence, attribution) of the student."""

    config: VisionConfig
    trunk: dict[str, Tensor]
    licences: tuple[tuple[str, str, str], ...]

    def fill(self, trunk: nn.Module) -> None:
        """Copy the weights into a timm model made from `config`.

        Raises:
            UsageError: they do not fit, as with the positions of a transformer at another size.
        """
        own = trunk.state_dict()
        odd = sorted(own.keys() ^ self.trunk.keys()) or [n for n in own if own[n].shape != self.trunk[n].shape]
        if odd:
            raise UsageError(
                f"the tower of student {self.config.origin!r} does not fit vision.size {self.config.size} (first at "
                f"{odd[0]!r}); parts of it would stay random, so leave vision.size out to have the student's"
            )
        trunk.load_state_dict(self.trunk)


def read_student_tower(config: VisionConfig) -> StudentTower:
    """The tower that `weights` "student:FOLDER" names; FOLDER is a saved CLIP student, or the run that holds one.

    Raises:
        UsageError: no student there, a pruned tower, or a value of `config` that is not the student's.
        IntegrityError, VersionError: as `load_student`.
    """
    folder = config.weights.removeprefix(STUDENT)
    with torch.device("cpu"):
        student = load_student(folder)
        origin = student.contract.model_id
    image, spec = student.config.image, student.image_spec
    if image.blocks:
        raise UsageError(
            f"the image tower of student {origin!r} is pruned, and a generative student builds its tower by timm's "
            "name alone, which gives the whole one; take the student from before the pruning"
        )
    own: dict[str, Any] = {
        "backbone": image.backbone,
        "backbone_args": image.backbone_args,
        "mean": spec.mean,
        "std": spec.std,
        "origin": origin,
    }
    odd = [key for key, value in own.items() if getattr(config, key) and getattr(config, key) != value]
    if odd:
        told = "; ".join(f"vision.{key} is {getattr(config, key)!r}, the student's {own[key]!r}" for key in odd)
        raise UsageError(
            f"the student in {folder!r} is not what the configuration describes ({told}); its weights would see other "
            "things than they learnt to, so leave these keys out or give another student"
        )
    size = config.size if "size" in config.model_fields_set else spec.size
    state = student.image_tower.state_dict()
    return StudentTower(
        config.model_copy(update={**own, "size": size}),
        {name.removeprefix(_TRUNK): value for name, value in state.items() if name.startswith(_TRUNK)},
        student.licences,
    )


def on_student_tower(config: VlmConfig, weights: str) -> VlmConfig:
    """`config` with the tower "student:FOLDER" in place of its own.

    Its size and levels stay; a trunk that takes one size only brings that along.

    Raises:
        UnknownNameError: something else than student:FOLDER. Others as `saved_config`.
    """
    if not weights.startswith(STUDENT):
        raise unknown_name("vision tower", weights, [f"{STUDENT}FOLDER"])
    image = saved_config(Path(weights.removeprefix(STUDENT))).image
    size = image.size if pretrained_cfg(image.backbone).fixed_input_size else config.vision.size
    vision = VisionConfig(weights=weights, size=size, levels=config.vision.levels)
    return config.model_copy(update={"vision": vision})
