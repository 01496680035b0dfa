"""How the convolutions of a tower get their fixed ranges: searched once, on held-out inputs, and used by every backend.

Three things are tried, by running the tower with the rounding that its file will have: how channels are equalised
(`export.equalize`), by which observer ranges are cut (`export.observers`), and how many convolutions at the input stay
in float. Early layers have few weights, and what they lose goes through all the others. The search stops where a tower
is comfortably kept; else the best of what was tried is taken, with more layers in float only if that helps much.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pocketvlm.export.equalize import equalize, loudness, tied_values
from pocketvlm.export.fake_quant import Step
from pocketvlm.export.fidelity import Fidelity, fidelity
from pocketvlm.export.observers import METHODS, Method
from pocketvlm.export.prepare import (
    BALANCE,
    STEM_LAYERS,
    Corrected,
    Prepared,
    Rounding,
    correct_bias,
    rounded_nodes,
    stem,
)
from pocketvlm.export.ranges import histograms, reach_of, steps_by
from pocketvlm.export.rounding import round_weight
from pocketvlm.export.stems import float_entirely
from pocketvlm.export.tuned import trained

# numbers of convolutions at the input that stay in float. Eight, and not seven or nine: the ninth of MobileNetV4 begins
# its residual stream, and where that begins in float onnxruntime turns every sum's layout around twice
STEMS = (STEM_LAYERS, 8)
# how far the loss must fall for more of them to stay in float where fewer meet the floor: each costs what int8 gains
_STEM_GAIN = 0.8
# exponents of `equalize`; None: channels as they are
ALPHAS: tuple[float | None, ...] = (None, 0.5, 1.0)
FEW: tuple[Method, ...] = ("minmax", "mse")
_BATCH = 32


@dataclass(frozen=True)
class Settings:
    """What was chosen. observer: of `export.observers`, unless ranges were trained. alpha: of `equalize`. stem:
    convolutions in float."""

    observer: Method | Literal["trained"] = "minmax"
    alpha: float | None = None
    stem: int = STEM_LAYERS

    def notes(self) -> dict[str, object]:
        """For `Variant.notes`."""
        return {"ranges": self.observer, "equalised": self.alpha or "no", "float_convolutions": self.stem}


@dataclass(frozen=True)
class Static:
    """A tower ready for static int8. graph: biases corrected. steps: node -> grid of its value."""

    graph: fx.GraphModule
    steps: dict[str, Step]
    settings: Settings


def static_tower(ready: Prepared) -> Static:
    """The best settings for a tower, searched at its first call, or what was trained; the graph is the caller's to
    copy."""
    tuned = trained(ready)
    if tuned is not None:
        return Static(tuned.graph, tuned.steps, Settings("trained", stem=tuned.float_layers))
    if ready.static is None:
        ready.static = search(ready) if ready.settings is None else build(ready, ready.settings)
        ready.settings = ready.static.settings
    found: Static = ready.static
    return found


def balance_notes(ready: Prepared) -> dict[str, object]:
    """How many inputs of linear layers were balanced with each exponent, for `Variant.notes`."""
    chosen = Counter(ready.balanced().meta.get(BALANCE, {}).values())
    return {"balanced": dict(sorted(chosen.items()))} if chosen else {}


def build(ready: Prepared, settings: Settings) -> Static:
    """The tower by these settings."""
    graph = ready.balanced()
    if settings.alpha is not None:
        equalize(graph, loudness(graph, ready.fit, tied_values(graph)), settings.alpha)
    names = rounded_nodes(graph, settings.stem)
    seen = histograms(graph, ready.fit, names, ends_only=settings.observer == "minmax")
    assert settings.observer != "trained", "only `static_tower` says that"
    steps = steps_by(seen, settings.observer)
    correct_bias(graph, ready.fit, settings.stem, ranges=_ends(steps))
    return Static(graph, steps, settings)


def search(ready: Prepared) -> Static:
    """The tower by the settings that keep the held-out inputs best: exponent, then observer, then layers in float."""
    tried: dict[Settings, Fidelity] = {}
    best: list[Static] = []

    def comfortable(settings: Settings) -> bool:
        if settings not in tried:
            static = build(ready, settings)
            tried[settings] = fidelity(simulate(static, ready.held), ready.expected)
            more = best and settings.stem > best[0].settings.stem and tried[best[0].settings].meets_floor
            better = not best or _loss(tried[settings]) < _loss(tried[best[0].settings]) * (_STEM_GAIN if more else 1.0)
            if better:
                best[:] = [static]
        return tried[settings].comfortable

    for alpha in ALPHAS:
        if comfortable(Settings(alpha=alpha)):
            return best[0]
    alpha = best[0].settings.alpha
    for layers in STEMS:
        # observers that lose on few float layers lose on more
        for observer in METHODS if layers == STEM_LAYERS else FEW:
            if comfortable(Settings(observer, alpha, layers)):
                return best[0]
    # the exponent that was best for whole ranges and few layers in float need not be the best here
    for alpha in ALPHAS:
        if comfortable(Settings("mse", alpha, STEMS[-1])):
            return best[0]
    return best[0]


@torch.no_grad()
def simulate(static: Static, rows: NDArray[Any]) -> NDArray[np.float32]:
    """The tower's rows with weights and activations rounded as its files round them: float32 [n, D]."""
    exempt = float_entirely(stem(static.graph, static.settings.stem))
    run = _Rounded(
        static.graph, {}, {}, exempt, _ends(static.steps), set(static.steps), Rounding(round_weight, "mixed")
    ).run
    # operators that write in place must not reach what was handed in
    parts = [run(torch.from_numpy(rows[i : i + _BATCH].copy())) for i in range(0, len(rows), _BATCH)]
    return torch.cat(parts).float().numpy()


class _Rounded(Corrected):
    """Biases are corrected already."""

    def correction(self, n: fx.Node, output: Tensor) -> Tensor:
        return torch.zeros(1)


def _ends(steps: dict[str, Step]) -> dict[str, tuple[Tensor, Tensor]]:
    ends = {name: reach_of(step) for name, step in steps.items()}
    return {name: (torch.tensor(low), torch.tensor(high)) for name, (low, high) in ends.items()}


def _loss(found: Fidelity) -> float:
    """Mean and 1st percentile, each as far from 1 as its floor allows twice over."""
    return (1 - found.mean) + (1 - found.p1) / 2
