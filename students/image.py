"""The image tower: uint8 pixels to a pooled timm feature and its projection into the joint space."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students.config import ImageConfig, Projection


def make_projection(config: Projection, width: int, embed_dim: int) -> nn.Module:
    """[B, width] -> [B, embed_dim], not normalised."""
    if config.kind == "linear":
        return nn.Linear(width, embed_dim, bias=config.bias)
    hidden = config.hidden or width
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, embed_dim, bias=config.bias))


class ImageTower(nn.Module):
    """uint8 [B, S, S, 3] (RGB) -> (embedding [B, D], features [B, F]), both not normalised, in the weights' dtype.

    The pixels are divided by 255 and standardised here, so that a graph takes what a decoder gives. The channel-last
    input also makes the convolutions run channel-last without a copy.
    """

    shift: Tensor
    spread: Tensor

    def __init__(self, trunk: nn.Module, projection: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.trunk = trunk
        self.projection = projection
        # in units of 0..255, because (x - 255 mean) / (255 std) is one subtraction and one division
        self.register_buffer("shift", torch.tensor(spec.mean).mul(255).reshape(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(spec.std).mul(255).reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = (pixels.permute(0, 3, 1, 2).to(self.shift.dtype) - self.shift) / self.spread
        features = self.trunk(x)
        return self.projection(features), features


def image_spec(config: ImageConfig) -> ImageSpec:
    """The preprocessing that goes with this tower; mean and std default to the timm model's own.

    Raises:
        UnknownNameError: timm has no model of that name.
    """
    cfg = _pretrained_cfg(config.backbone)
    return ImageSpec(
        size=config.size,
        resize=config.resize,
        filter=config.filter,
        crop_fraction=config.crop_fraction,
        mean=config.mean or cast("tuple[float, float, float]", tuple(cfg.mean)),
        std=config.std or cast("tuple[float, float, float]", tuple(cfg.std)),
    )


def build_image_tower(config: ImageConfig, embed_dim: int, *, load_weights: bool = True) -> ImageTower:
    """Make the tower; random parts come from the current CPU generator (see `students.build`).

    Args:
        load_weights: False leaves `config.weights` unread (the caller loads a whole state dict next).

    Raises:
        UnknownNameError: timm has no model of that name.
        UsageError: the model refuses its arguments, does not run at `config.size`, or gives no pooled feature.
    """
    spec = image_spec(config)
    arguments: dict[str, Any] = {"num_classes": 0, **config.backbone_args}
    if _pretrained_cfg(config.backbone).fixed_input_size:
        arguments.setdefault("img_size", config.size)
    try:
        trunk = timm.create_model(config.backbone, pretrained=False, **arguments)
    except TypeError as error:
        raise UsageError(
            f"timm model {config.backbone!r} does not take image.backbone_args {config.backbone_args} ({error}); "
            "remove what it does not know"
        ) from error
    if load_weights and config.weights != "none":
        from pocketvlm.students.pretrained import load_backbone_weights

        load_backbone_weights(trunk, config.backbone, config.weights)
    width = _feature_width(trunk, config)
    return ImageTower(trunk, make_projection(config.projection, width, embed_dim), spec)


def _pretrained_cfg(backbone: str) -> Any:
    if not timm.is_model(backbone):
        raise unknown_name("timm model", backbone, timm.list_models())
    # get_pretrained_cfg answers None for a few architectures without any published weights
    cfg = timm.models.get_pretrained_cfg(backbone)
    return cfg if cfg is not None else timm.models.PretrainedCfg()


def _feature_width(trunk: nn.Module, config: ImageConfig) -> int:
    """Asked by running it: timm's num_features is the width before some heads' last layer."""
    training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad():
            features = trunk(torch.zeros(1, 3, config.size, config.size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"timm model {config.backbone!r} does not run on {config.size} x {config.size} pixels "
            f"({str(error).splitlines()[0]}); choose another image.size, often a multiple of 32"
        ) from error
    finally:
        trunk.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise UsageError(
            f"timm model {config.backbone!r} gives no pooled [batch, width] feature, which the projection needs; "
            "choose a classification model or set image.backbone_args.global_pool"
        )
    return features.shape[1]
