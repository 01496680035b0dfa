"""Parameter groups, schedules, the moving average of the weights, and precision: all that the loop only calls."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.distill.recipe import ObjectiveSection, TrainSection
from pocketvlm.edge.errors import UsageError, unknown_name


def parameter_groups(student: nn.Module, objectives: nn.Module, train: TrainSection) -> list[dict[str, Any]]:
    """AdamW groups. No decay on vectors and scalars (norms, biases, scales); `lr_scale` by longest prefix.

    Each group carries "lr_scale", which the loop multiplies into the scheduled rate. Parameters of factor 0 are
    frozen for good (`requires_grad_(False)`) and in no group. Projectors of objectives train at factor 1.

    Raises:
        UnknownNameError: a prefix of `lr_scale`, `freeze`, `freeze_after` or `hold_statistics` that fits no parameter.
    """
    names = [name for name, _ in student.named_parameters()]
    for prefix in [*train.lr_scale, *train.freeze, *train.freeze_after, *train.hold_statistics]:
        if not any(_under(name, prefix) for name in names):
            parts = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2, 3)}
            raise unknown_name("parameter prefix", prefix, parts)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        scale = _scale(name, train)
        if scale == 0 or _below_cut(name, train):
            parameter.requires_grad_(False)
        else:
            groups.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    for parameter in objectives.parameters():
        groups.setdefault((1.0, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise UsageError("train.lr_scale freezes every parameter, so nothing would be learned; leave some free")
    return [
        {"params": params, "lr_scale": scale, "weight_decay": train.weight_decay if decays else 0.0}
        for (scale, decays), params in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1]))
    ]


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _scale(name: str, train: TrainSection) -> float:
    fitting = [prefix for prefix in train.lr_scale if _under(name, prefix)]
    return train.lr_scale[max(fitting, key=len)] if fitting else 1.0


def _below_cut(name: str, train: TrainSection) -> bool:
    if train.cut_after_block is None:
        return False
    trunk = "image_tower.trunk"
    blocks = [f"{trunk}.blocks.{index}" for index in range(train.cut_after_block + 1)]
    return any(_under(name, prefix) for prefix in (f"{trunk}.conv_stem", f"{trunk}.bn1", *blocks))


def is_frozen(name: str, train: TrainSection, step: int) -> bool:
    """Whether the parameter or module of this name stands still at a 0-based step of the main phase."""
    waiting = any(_under(name, prefix) and step < steps for prefix, steps in train.freeze.items())
    done = any(_under(name, prefix) and step >= steps for prefix, steps in train.freeze_after.items())
    return waiting or done or _scale(name, train) == 0 or _below_cut(name, train)


def apply_freezing(student: nn.Module, train: TrainSection, step: int) -> None:
    """Put the student into training mode with the parts that are frozen at `step` held still.

    Frozen modules are in eval mode as well, so that their batch-norm statistics do not drift; modules under
    `hold_statistics` are in eval mode while their parameters are trained.
    """
    for name, module in student.named_modules():
        held = any(_under(name, prefix) for prefix in train.hold_statistics)
        module.training = not (held or is_frozen(name, train, step))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not is_frozen(name, train, step))


def learning_rate(step: int, total: int, train: TrainSection) -> float:
    """Linear warm-up, then half a cosine down to `min_lr_ratio * lr`; a pure function of the step (0-based)."""
    warmup = min(train.warmup_steps, total)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    floor = train.min_lr_ratio
    return train.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def progress(step: int, total: int) -> float:
    """0 at the first of `total` 0-based steps (and before), 1 at the last (and after)."""
    return min(1.0, max(0, step) / max(1, total - 1))


def objective_weight(spec: ObjectiveSection, step: int, total: int) -> float:
    """The weight of an objective at a 0-based step of the main phase (see `ObjectiveSection.schedule`)."""
    if spec.schedule == "constant":
        return spec.weight
    share = progress(step, spec.schedule_steps or total)
    if spec.schedule == "warmup":
        return spec.weight * share
    if spec.schedule == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return spec.weight + (spec.final_weight - spec.weight) * share


class Average:
    """Exponential moving average of a module's whole state, buffers (batch-norm statistics) included.

    The decay starts low, min(decay, (1 + t) / (10 + t)), so that a short run is not dominated by its start.
    module: a copy that holds the average, always in evaluation mode, without gradients; what it computes is what the
    averaged student computes.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.module: Any = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        # both list a shared tensor once, so it is averaged once
        pairs = [*zip(self.module.parameters(), module.parameters()), *zip(self.module.buffers(), module.buffers())]
        own, new = [], []
        for average, value in pairs:
            if value.is_floating_point():
                own.append(average)
                new.append(value.detach())
            else:
                average.copy_(value)
        # one call for all: on a GPU, hundreds of small ones would cost as much as the forward
        torch._foreach_lerp_(own, new, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "state": self.module.state_dict()}

    def load_state_dict(self, value: Mapping[str, Any]) -> None:
        self.updates = int(value["updates"])
        self.module.load_state_dict(value["state"])


def switch(student: nn.Module, average: nn.Module, train: TrainSection, step: int) -> None:
    """Put the average into the student (`train.switch_every`), but for what stands still at this step.

    The average still lags behind a part that `freeze_after` holds, which would go on moving towards its own past.
    """
    state = {name: value for name, value in average.state_dict().items() if not is_frozen(name, train, step)}
    student.load_state_dict(state, strict=False)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state that later training does not change."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@contextmanager
def replaced(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with the weights `state` inside, its own back afterwards."""
    own = snapshot(module)
    module.load_state_dict(state)
    try:
        yield
    finally:
        module.load_state_dict(own)


def interpolated(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) start + share trained of every floating-point entry; counters are the trained ones.

    Everything that the student has takes part: both towers, batch-norm statistics, and the logarithm of the logit
    scale, whose scale is therefore the weighted geometric mean. So share 1 is the trained student, and 0 the start.
    Sources: WiSE-FT (Wortsman et al. 2021, 2109.01903), CLIPSelf (Wu et al. 2023, 2310.01403).
    """
    return {
        name: torch.lerp(start[name], value, share) if value.is_floating_point() else value.clone()
        for name, value in trained.items()
    }


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The reduced dtype for the towers' forward, or None for float32. Objectives always run in float32.

    Raises:
        UsageError: fp16 on a CPU, where gradients would underflow without the scaler that only CUDA has.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise UsageError(
            f"train.precision fp16 needs loss scaling, which is here for CUDA only, and the device is {device.type}; "
            "use bf16 or fp32"
        )
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of every torch generator that a forward on `device` may draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def gradient_norm(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """Total 2-norm of the gradients; they are scaled down to `clip` where it is positive."""
    graded = [parameter for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(graded, clip if clip > 0 else float("inf"))
