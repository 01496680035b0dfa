"""The vision tower of a generative student: uint8 pixels to one token for each place of the last map."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.image import pretrained_cfg
from pocketvlm.students.vlm.config import STUDENT, VisionConfig
from pocketvlm.students.vlm.tower import read_student_tower


class VisionTower(nn.Module):
    """uint8 [B, S, S, 3] (RGB) to tokens [B, G * G, C], row by row.

    A token holds the levels, averaged to its place, and the last map there. grid: G; width: C; last_width: how many of
    C, the last ones, are the last map's. config: with what a CLIP student's folder said; licences: rows from there.
    """

    shift: Tensor
    spread: Tensor

    def __init__(self, config: VisionConfig, *, load_weights: bool = True) -> None:
        """Random parts come from torch's current generator.

        Raises:
            UnknownNameError: timm has no model of that name.
            UsageError: it refuses its arguments, does not run at this size, its map is not square, or as
                `read_student_tower`.
        """
        super().__init__()
        student = None
        if config.weights.startswith(STUDENT) and (load_weights or config.origin is None):
            student = read_student_tower(config)
            config = student.config
        self.config, self.licences = config, () if student is None else student.licences
        cfg = pretrained_cfg(config.backbone)
        arguments: dict[str, Any] = {"num_classes": 0, **config.backbone_args}
        if cfg.fixed_input_size:
            arguments.setdefault("img_size", config.size)
        try:
            self.trunk = timm.create_model(config.backbone, pretrained=False, **arguments)
        except TypeError as error:
            raise UsageError(
                f"timm model {config.backbone!r} does not take vision.backbone_args {config.backbone_args} ({error}); "
                "remove what it does not know"
            ) from error
        if load_weights and student is not None:
            student.fill(self.trunk)
        elif load_weights and config.weights != "none":
            from pocketvlm.students.pretrained import load_backbone_weights

            load_backbone_weights(self.trunk, config.backbone, config.weights)
        self.levels = tuple(sorted(config.levels))
        mean, std = config.mean or cfg.mean, config.std or cfg.std
        # in units of 0..255, because (x - 255 mean) / (255 std) is one subtraction and one division
        self.register_buffer("shift", torch.tensor(mean).mul(255).reshape(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(std).mul(255).reshape(3, 1, 1), persistent=False)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                blank = torch.zeros(1, config.size, config.size, 3, dtype=torch.uint8, device=self.shift.device)
                maps = self._maps(blank)
        except (RuntimeError, AssertionError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise UsageError(
                f"timm model {config.backbone!r} gives no maps for {config.size} x {config.size} pixels with levels "
                f"{list(config.levels)} ({type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}); choose "
                "another vision.size (often a multiple of 32) or other levels"
            ) from error
        self.train(training)
        self.grid = maps[-1].shape[-1]
        self.width = sum(found.shape[1] for found in maps)
        self.last_width = maps[-1].shape[1]
        if maps[-1].shape[-2] != self.grid:
            raise UsageError(
                f"timm model {config.backbone!r} gives a map of {maps[-1].shape[-2]} x {self.grid} places for a square "
                "picture, so places would be mistaken; choose another backbone"
            )

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def prefix(self) -> int:
        """Tokens that the trunk has before the picture's, the class token first."""
        return int(getattr(self.trunk, "num_prefix_tokens", 0))

    @property
    def has_class_token(self) -> bool:
        return self.prefix > 0 and getattr(self.trunk, "cls_token", None) is not None

    @property
    def has_attention(self) -> bool:
        """Whether every block is one of timm's with global attention, whose probabilities can be looked at."""
        return bool(_attentions(self.trunk))

    def watch(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`forward`, and the attention probabilities of every block, [B, H, P + N, P + N] each.

        Fused attention never makes them, so it is off during this call, which costs its speed.

        Raises:
            UsageError: a tower without global attention.
        """
        layers = _attentions(self.trunk)
        if not layers:
            raise UsageError(
                f"timm model {type(self.trunk).__name__} has no blocks of global attention, so there are no "
                "attention maps to score tokens by; use the score 'distinct'"
            )
        found: list[Tensor] = []
        fused = [layer.fused_attn for layer in layers]
        # what the dropout of probabilities is given, which is nothing else than they
        hooks = [layer.attn_drop.register_forward_pre_hook(lambda _, given: found.append(given[0])) for layer in layers]
        try:
            for layer in layers:
                layer.fused_attn = False
            return self(pixels), found
        finally:
            for layer, before, hook in zip(layers, fused, hooks):
                layer.fused_attn = before
                hook.remove()

    def forward(self, pixels: Tensor) -> Tensor:
        *inner, last = self._maps(pixels)
        joined = torch.cat(
            [*(F.adaptive_avg_pool2d(level, (last.shape[2], last.shape[3])) for level in inner), last], dim=1
        )
        return joined.flatten(2).transpose(1, 2)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        """The levels and the last map, [B, C_k, H_k, W_k] each."""
        x = (pixels.permute(0, 3, 1, 2).to(self.shift.dtype) - self.shift) / self.spread
        trunk = cast(Any, self.trunk)
        if not self.levels:
            last, inner = trunk.forward_features(x), []
        else:
            last, inner = trunk.forward_intermediates(x, indices=list(self.levels))
        if last.ndim == 3:
            last = last[:, self.prefix :]
            side = round(int(last.shape[1]) ** 0.5)  # a number for tracers too
            last = last.transpose(1, 2).unflatten(2, (side, side))
        elif getattr(trunk, "output_fmt", None) == "NHWC":
            last = last.permute(0, 3, 1, 2)
        return [*inner, last]


def _attentions(trunk: nn.Module) -> list[Any]:
    """The attention modules of a trunk that is a row of timm's transformer blocks, else nothing."""
    found = [getattr(block, "attn", None) for block in cast(Any, getattr(trunk, "blocks", ()))]
    known = all(hasattr(layer, "fused_attn") and hasattr(layer, "attn_drop") for layer in found)
    return found if found and known and hasattr(trunk, "num_prefix_tokens") else []
