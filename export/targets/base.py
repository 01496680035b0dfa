"""One interface for every export backend."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol
from weakref import WeakKeyDictionary

from numpy.typing import NDArray
from torch import nn

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.export.mixed import Plan
from pocketvlm.export.precision import CALIBRATED, PRECISIONS, Precision


@dataclass(frozen=True)
class Towers:
    """The deployable graphs: uint8 [B, S, S, 3] -> [B, D] and int32 [B, L] -> [B, D], L2-normalised, eval mode."""

    image: nn.Module | None
    text: nn.Module | None
    contract: ModelContract


@dataclass(frozen=True)
class Calibration:
    """Real inputs for quantization: uint8 [n, S, S, 3] pixels and int32 [n, L] ids.

    warnings: sentences on what these inputs are too few or too much alike for.
    memo: tower -> what `export.prepare.prepared` made of it with these inputs, so that the int8 targets share it.
    """

    pixels: NDArray
    ids: NDArray
    description: str
    warnings: tuple[str, ...] = ()
    memo: MutableMapping[nn.Module, Any] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )


@dataclass(frozen=True)
class Variant:
    """One target at one precision. files: tower name -> path relative to the bundle folder."""

    target: str
    precision: str
    files: dict[str, str]
    batch: Literal["dynamic", "fixed-1"]
    dim: int | None = None
    notes: dict[str, object] = field(default_factory=dict)


class Target(Protocol):
    """A backend that lowers towers into files under `folder` (the bundle root).

    precisions: what it writes. defaults: those that it writes when none is asked for. refused: each other name of the
    vocabulary, and why.
    """

    name: ClassVar[str]
    refused: ClassVar[dict[str, str]]

    @property
    def precisions(self) -> tuple[str, ...]: ...
    @property
    def defaults(self) -> tuple[str, ...]: ...
    def lower(
        self,
        towers: Towers,
        *,
        precision: Precision,
        folder: Path,
        calibration: Calibration | None,
        plan: Plan | None = None,
    ) -> Variant: ...


def check_precision(target: Target, precision: str, calibration: Calibration | None, plan: Plan | None = None) -> None:
    """Refuse what a backend cannot write.

    Raises:
        UnknownNameError: no such precision.
        UsageError: not one of this backend's, one that needs calibration inputs without them, or "mixed" without a
            plan.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision not in target.precisions:
        raise UsageError(
            f"target {target.name!r} cannot write precision {precision!r} ({target.refused[precision]}), only "
            f"{', '.join(target.precisions)}; nothing was exported, so choose one of those"
        )
    if precision in CALIBRATED and calibration is None:
        raise UsageError(
            f"target {target.name!r} was asked for {precision} without calibration data; ranges guessed from noise "
            "lose accuracy, so pass real data (--data, in Python calibration_data=...)"
        )
    if precision == "mixed" and plan is None:
        raise UsageError(
            f"target {target.name!r} was asked for mixed without a plan, so no block would stay in float and it would "
            "be int8; make one with 'pocketvlm quantize' and pass it (--plan FILE, in Python plan=...), or ask for int8"
        )
