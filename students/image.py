"""The image tower: uint8 pixels to a pooled timm feature and its projection into the joint space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students.config import ImageConfig, Projection


class ProjectionHead(nn.Module):
    """[B, width] -> [B, embed_dim], not normalised: optional standardisation, then Linear or an MLP."""

    def __init__(self, config: Projection, width: int, embed_dim: int) -> None:
        super().__init__()
        norms = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.norm = norms[config.norm](width)
        hidden = config.hidden or width
        self.first = nn.Linear(
            width, hidden if config.kind == "mlp" else embed_dim, bias=config.kind == "mlp" or config.bias
        )
        self.act = nn.GELU() if config.kind == "mlp" else nn.Identity()
        self.second = nn.Linear(hidden, embed_dim, bias=config.bias) if config.kind == "mlp" else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return self.second(self.act(self.first(self.norm(features))))


class ImageTower(nn.Module):
    """uint8 [B, S, S, 3] (RGB) -> (embedding [B, D], features [B, F]), both not normalised, in the weights' dtype.

    The pixels are divided by 255 and standardised here, so that a graph takes what a decoder gives. The channel-last
    input also makes the convolutions run channel-last without a copy. widths: of the features' parts, in order.
    """

    shift: Tensor
    spread: Tensor

    def __init__(self, trunk: nn.Module, levels: tuple[int, ...], spec: ImageSpec) -> None:
        super().__init__()
        self.trunk = trunk
        self.levels = levels
        self.widths: tuple[int, ...] = ()
        self.projection: nn.Module = nn.Identity()
        self.plain_layout = any(_breaks_channel_last(module) for module in trunk.modules())
        # in units of 0..255, because (x - 255 mean) / (255 std) is one subtraction and one division
        self.register_buffer("shift", torch.tensor(spec.mean).mul(255).reshape(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(spec.std).mul(255).reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pixels)
        return self.projection(features), features

    def features(self, pixels: Tensor) -> Tensor:
        """Pooled features [B, F]: the levels, lowest first, then the trunk's own."""
        return torch.cat(self.parts(pixels), dim=1)

    def parts(self, pixels: Tensor) -> list[Tensor]:
        """`features` before they are joined, [B, F_k] each."""
        x, trunk = self.standardised(pixels), cast(Any, self.trunk)
        if not self.levels:
            return [trunk(x)]
        if self.has_blocks:
            return self._rest(trunk.bn1(trunk.conv_stem(x)), 0)
        last, inner = trunk.forward_intermediates(x, indices=list(self.levels))
        return [*(level.mean(dim=(2, 3)) for level in inner), trunk.forward_head(last)]

    def dense(self, last: Tensor, levels: Sequence[Tensor] = ()) -> Tensor:
        """Embeddings at every place of the last map, [B, C, H, W] -> [B, D, H, W], not normalised.

        Each place goes through head and projection as a map of one place would; where both are linear, their mean is
        the picture's embedding. last: the tap "tokens". levels: the maps of `self.levels` in order, averaged to the
        places of the last.

        Raises:
            UsageError: a trunk whose tokens are no map, or whose levels were not given.
        """
        if last.ndim != 4 or len(levels) != len(self.levels):
            raise UsageError(
                f"the embedding of each place was asked of a {type(self.trunk).__name__}, whose last tokens are no map "
                "with levels beside it; use a convolutional trunk, and levels only with EfficientNet or MobileNet"
            )
        trunk, (batch, channels, height, width) = cast(Any, self.trunk), last.shape
        one = (1, 1, channels) if getattr(trunk, "output_fmt", None) == "NHWC" else (channels, 1, 1)
        maps = [F.adaptive_avg_pool2d(level, (height, width)) for level in levels]
        parts = [level.permute(0, 2, 3, 1).flatten(0, 2) for level in maps]
        parts.append(trunk.forward_head(last.permute(0, 2, 3, 1).reshape(-1, *one)))
        found = self.projection(torch.cat(parts, dim=1))
        return found.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)

    def record_tokens(self, keep: Callable[[Tensor], None]) -> Callable[[], None]:
        """Have `keep` called with the last map before pooling in every forward; returns what undoes it.

        The map is [B, C, H, W], or [B, N, W] without class and register tokens. It is what every timm model hands to
        `forward_head`, whichever of this tower's ways leads there, so nothing is added to the graph.
        """
        trunk = cast(Any, self.trunk)
        head, prefix = trunk.forward_head, getattr(trunk, "num_prefix_tokens", 0)
        channels_last = getattr(trunk, "output_fmt", None) == "NHWC"

        def recording(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.ndim == 4:
                keep(x.permute(0, 3, 1, 2) if channels_last else x)
            else:
                keep(x[:, prefix:])
            return head(x, *args, **kwargs)

        trunk.forward_head = recording
        return lambda: delattr(trunk, "forward_head")

    def standardised(self, pixels: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> [B, 3, S, S] with the contract's mean and std taken out."""
        x = pixels.permute(0, 3, 1, 2).to(self.shift.dtype)
        if self.training and x.dtype != pixels.dtype and not torch.compiler.is_compiling():
            # the same numbers without two more arrays of the batch's size: half the time; graphs stay functional
            x = x.sub_(self.shift).div_(self.spread)
            return x.contiguous() if self.plain_layout and x.device.type == "cpu" else x
        return (x - self.shift) / self.spread

    @property
    def has_blocks(self) -> bool:
        """Whether the trunk can be cut after `trunk.blocks.K` (EfficientNet and MobileNet families)."""
        return isinstance(self.trunk, (EfficientNet, MobileNetV3))

    def until_block(self, pixels: Tensor, block: int) -> Tensor:
        """Activations [B, C, H, W] after `trunk.blocks[block]`, to cache what a frozen lower part gives.

        Raises:
            UsageError: the trunk has no such cut.
        """
        self._check_cut(block)
        x = self.trunk.bn1(self.trunk.conv_stem(self.standardised(pixels)))  # type: ignore[operator]
        for module in self.trunk.blocks[: block + 1]:  # type: ignore[index]
            x = module(x)
        return x

    def from_block(self, x: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """(embedding, features) from the activations of `until_block`; levels up to `block` are then out of reach.

        Raises:
            UsageError: the trunk has no such cut, or a level lies before it.
        """
        self._check_cut(block)
        if any(level < block for level in self.levels):
            raise UsageError(
                f"a tower with levels {self.levels} was cut after block {block}; the lower ones could not be computed, "
                f"so cut after block {min(self.levels)} or earlier"
            )
        features = torch.cat(self._rest(x, block + 1), dim=1)
        return self.projection(features), features

    def _rest(self, x: Tensor, start: int) -> list[Tensor]:
        trunk: Any = self.trunk
        pooled = {start - 1: x.mean(dim=(2, 3))} if start - 1 in self.levels else {}
        for index, module in enumerate(trunk.blocks):
            if index >= start:
                x = module(x)
                if index in self.levels:
                    pooled[index] = x.mean(dim=(2, 3))
        if isinstance(trunk, EfficientNet):
            x = trunk.bn2(trunk.conv_head(x))
        return [*(pooled[level] for level in self.levels), trunk.forward_head(x)]

    def _check_cut(self, block: int) -> None:
        count = len(self.trunk.blocks) if self.has_blocks else 0  # type: ignore[arg-type]
        if not 0 <= block < count:
            raise UsageError(
                f"an image tower was to be cut after block {block} but its trunk has {count} blocks to cut after; "
                "choose 0 to the last of an EfficientNet or MobileNet trunk, or train from pixels"
            )


def image_spec(config: ImageConfig) -> ImageSpec:
    """The preprocessing that goes with this tower; mean and std default to the timm model's own.

    Raises:
        UnknownNameError: timm has no model of that name.
    """
    cfg = pretrained_cfg(config.backbone)
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
    if pretrained_cfg(config.backbone).fixed_input_size:
        arguments.setdefault("img_size", config.size)
    try:
        trunk = timm.create_model(config.backbone, pretrained=False, **arguments)
    except TypeError as error:
        raise UsageError(
            f"timm model {config.backbone!r} does not take image.backbone_args {config.backbone_args} ({error}); "
            "remove what it does not know"
        ) from error
    if config.blocks:
        from pocketvlm.students.blocks import resize_blocks

        resize_blocks(trunk, config.blocks, config.backbone)
    if load_weights and config.weights != "none":
        from pocketvlm.students.pretrained import load_backbone_weights

        load_backbone_weights(trunk, config.backbone, config.weights)
    if len(set(config.levels)) != len(config.levels):
        raise UsageError(
            f"image.levels {config.levels} names a level twice; its features would count double, so name it once"
        )
    tower = ImageTower(trunk, tuple(sorted(config.levels)), spec)
    tower.widths = _part_widths(tower, config)
    tower.projection = ProjectionHead(config.projection, sum(tower.widths), embed_dim)
    return tower


def _breaks_channel_last(module: nn.Module) -> bool:
    """Whether the CPU gradient of this layer's weight is wrong, or ends the process, on channel-last inputs.

    oneDNN writes past its workspace for strided 1 x 1 convolutions of fewer channels than its block has, 16 at most
    (oneDNN issue 6035; seen with torch 2.14 in FastViT's stem).
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < 16
    )


def pretrained_cfg(backbone: str) -> Any:
    """What timm says of the model's published weights: mean, std, fixed_input_size and more.

    Raises:
        UnknownNameError: timm has no model of that name.
    """
    if not timm.is_model(backbone):
        raise unknown_name("timm model", backbone, timm.list_models())
    # get_pretrained_cfg answers None for a few architectures without any published weights
    cfg = timm.models.get_pretrained_cfg(backbone)
    return cfg if cfg is not None else timm.models.PretrainedCfg()


def _part_widths(tower: ImageTower, config: ImageConfig) -> tuple[int, ...]:
    """Asked by running it: timm's num_features is the width before some heads' last layer."""
    training = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            parts = tower.parts(torch.zeros(1, config.size, config.size, 3, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(
            f"timm model {config.backbone!r} does not run on {config.size} x {config.size} pixels with levels "
            f"{list(config.levels)} ({type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}); choose another "
            "image.size (often a multiple of 32) or other levels"
        ) from error
    finally:
        tower.train(training)
    if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        raise UsageError(
            f"timm model {config.backbone!r} gives no pooled [batch, width] feature, which the projection needs; "
            "choose a classification model or set image.backbone_args.global_pool"
        )
    return tuple(part.shape[1] for part in parts)
