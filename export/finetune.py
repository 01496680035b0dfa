"""Fine-tuning with fake quantization: what is left of a student's float weights adapts to the rounding that ships.

The towers that an export has prepared (batch norm folded, linear layers balanced, biases corrected) run with the
rounding of their files (`export.fake_quant`) and are pulled back to what the float student gives for the same inputs,
by the kit's own objectives: `feature`, each embedding to where it was, and `gram`, the likeness of every two of a
batch's embeddings, across towers too. No labels and no teacher are needed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketvlm.distill.objectives import Outputs, Widths, build_objective
from pocketvlm.edge.errors import UsageError
from pocketvlm.export.calibration import open_calibration
from pocketvlm.export.fake_quant import INT8, FakeQuantized
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.prepare import CONVOLUTIONS, STEM_LAYERS, Prepared, Rounding
from pocketvlm.export.source import Exportable
from pocketvlm.export.static import static_tower
from pocketvlm.export.targets import onnx
from pocketvlm.export.targets.base import Calibration, Towers
from pocketvlm.export.targets.onnx import Tower, prepared_tower, present_towers
from pocketvlm.export.tuned import Trained, Tuned
from pocketvlm.teachers.device import pick_device

# precisions that are trained; the others are written as they are without
TRAINED = ("int8", "w4")
# fewer inputs than this in the training part, and a batch is most of them
MIN_ROWS = 48
_CHECKS = 8
_SMALLEST = 1e-3
# one step of every weight at once adds up over the many layers of a convolutional tower
_CONVOLUTIONAL = 0.3
# steps of 4 bits are sixteen times as wide as those of 8, and smaller changes reach no other one
_COARSE = 10.0


@dataclass(frozen=True)
class Finetune:
    """How to fine-tune.

    steps: of Adam, on `batch` pictures and as many texts. rate: the largest change of a weight in one step, as a share
    of its tensor's root mean square, in a convolutional tower three tenths of that, of weights in 4 bits ten
    times; it falls to 0 by half a cosine. scale_rate: of the logarithm of each activation's
    step. feature, relation: weights of the objectives `feature` (cosine) and `gram` (cosine). rows: at most so many
    pictures and texts to learn from. device: "cpu", "cuda" or "auto".

    Raises:
        UsageError: a number that cannot work.
    """

    steps: int = 200
    batch: int = 16
    rate: float = 1e-4
    scale_rate: float = 3e-4
    feature: float = 1.0
    relation: float = 16.0
    rows: int = 2048
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(
                f"fine-tuning was asked for {self.steps} steps and nothing would change; give 1 or more (200 is "
                "usual), or leave it out"
            )
        if self.batch < 2 or min(self.feature, self.relation) < 0 or not self.feature + self.relation:
            raise UsageError(
                f"fine-tuning was given batch {self.batch}, feature {self.feature:g} and relation {self.relation:g}; "
                "nothing could be learnt, so use a batch of 2 or more and weights of which one is above 0"
            )


def finetune_export(
    settings: Finetune | int,
    plan: Sequence[tuple[str, str]],
    model: Exportable,
    calibration: Calibration | None,
    data: Any,
    progress: Callable[[str], None] | None = None,
) -> None:
    """`finetune_towers` for an export. settings: or the number of steps. data: what calibrates it, of which up to
    `Finetune.rows` further pictures and texts are learnt from where it is no ready `Calibration`.

    Raises:
        UsageError: as `finetune_towers`, or settings that cannot work.
    """
    how = Finetune(settings) if isinstance(settings, int) else settings
    more = None
    if data is not None and not isinstance(data, Calibration):
        more = open_calibration(data, model.towers.contract, model.tokenizer(), size=how.rows)[0]
    finetune_towers(plan, model.towers, calibration, how, more, progress)


def finetune_towers(
    plan: Sequence[tuple[str, str]],
    towers: Towers,
    calibration: Calibration | None,
    settings: Finetune,
    more: Calibration | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Train the towers for every precision of an export that learns from it; targets are given the result by
    `prepared_tower`, with the same calibration.

    Three quarters of `calibration`, and all of `more`, are learnt from; the quarter that every export holds out judges
    each tower as it was at the start and at every eighth of the way, and the best of these is kept: a tower that did
    not gain is left with the integers that it has without.

    Args:
        plan: (target, precision) of every variant.
        more: further inputs; those that `calibration` has too are passed over.
        progress: called with one line per precision and tower.

    Raises:
        UsageError: no calibration inputs, too few, or no precision that learns.
    """
    roundings = _roundings(plan)
    if not roundings:
        raise UsageError(
            f"fine-tuning was asked for and {', '.join(dict.fromkeys(p for _, p in plan))} learns nothing from it; add "
            f"{' or '.join(TRAINED)} for onnx or executorch, or leave fine-tuning out"
        )
    if calibration is None:
        raise UsageError(
            "fine-tuning was asked for without calibration data; there is nothing to learn from, so pass the pictures "
            "and texts that the student was trained on (--data, in Python calibration_data=...)"
        )
    modules = dict(present_towers(towers))
    ready = {tower: prepared_tower(module, calibration, tower) for tower, module in modules.items()}
    rows = {tower: _rows(tower, calibration, found, more) for tower, found in ready.items()}
    for tower, given in rows.items():
        if len(given) < MIN_ROWS:
            raise UsageError(
                f"fine-tuning of the {tower} tower was given {len(given)} inputs to learn from and needs {MIN_ROWS}; "
                "it would learn them by heart, so name more data or leave fine-tuning out"
            )
    targets = {tower: torch.from_numpy(run_module(module, rows[tower])) for tower, module in modules.items()}
    results: dict[Tower, dict[Rounding, Trained]] = {tower: {} for tower in ready}
    for rounding, precision in roundings.items():
        started = time.perf_counter()
        fakes = {tower: _fake(found, rounding, precision) for tower, found in ready.items()}
        before, after = _train(fakes, ready, rows, targets, settings)
        seconds = time.perf_counter() - started
        for tower, fake in fakes.items():
            notes = _notes(settings, len(rows[tower]), before[tower], after[tower], seconds)
            results[tower][rounding] = Trained(fake.frozen(), fake.steps(), notes, fake.float_layers)
            if progress:
                progress(f"fine-tuned {precision} {tower}: 1 - cosine {before[tower]:.5f} to {after[tower]:.5f}")
    for tower, module in modules.items():
        digest, found = calibration.memo[module]
        calibration.memo[module] = (digest, Tuned(found, results[tower]))


def _roundings(plan: Sequence[tuple[str, str]]) -> dict[Rounding, str]:
    """What the files of a plan round, and the precision; the targets share int8 and differ in 4 bits."""
    found = {INT8: "int8"} if any(precision == "int8" for _, precision in plan) else {}
    if ("onnx", "w4") in plan:
        found[onnx.ROUNDINGS["w4"]] = "w4"
    if ("executorch", "w4") in plan:
        from pocketvlm.export.targets import executorch

        found[executorch.ROUNDINGS["w4"]] = "w4"
    return found


def _rows(tower: Tower, calibration: Calibration, ready: Prepared, more: Calibration | None) -> NDArray[Any]:
    given, extra = (
        (getattr(source, "pixels" if tower == "image" else "ids") if source else ready.fit[:0])
        for source in (calibration, more)
    )
    known = {row.tobytes() for row in given}
    new = [row for row in extra if row.tobytes() not in known]
    return np.concatenate([ready.fit, np.stack(new)]) if new else ready.fit


def _fake(ready: Prepared, rounding: Rounding, precision: str) -> FakeQuantized:
    if precision == "w4":
        return FakeQuantized(ready.rounded(rounding, 4), {}, STEM_LAYERS, rounding)
    if ready.convolutional:
        static = static_tower(ready)
        return FakeQuantized(copy.deepcopy(static.graph), static.steps, static.settings.stem, rounding)
    graph, float_layers = ready.graph(static=False)
    return FakeQuantized(graph, {}, float_layers, rounding)


def _train(
    fakes: dict[Tower, FakeQuantized],
    ready: dict[Tower, Prepared],
    rows: dict[Tower, NDArray[Any]],
    targets: dict[Tower, Tensor],
    settings: Finetune,
) -> tuple[dict[Tower, float], dict[Tower, float]]:
    """Train in place; returns the held-out mean 1 - cosine of each tower at the start, and of what was kept."""
    device = pick_device(settings.device)
    for fake in fakes.values():
        fake.to(device).requires_grad_(True)
    loss_of = _objectives(next(iter(targets.values())).shape[1], settings)
    optimizer = torch.optim.Adam([group for fake in fakes.values() for group in _groups(fake, settings)])
    # Adam's first steps are as long as they may be, whatever the gradient
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
    )
    before = {tower: _judge(fake, ready[tower], device) for tower, fake in fakes.items()}
    best = dict(before)
    kept = {tower: copy.deepcopy(fake.state_dict()) for tower, fake in fakes.items()}
    generator = np.random.default_rng(settings.seed)
    every = max(1, settings.steps // _CHECKS)
    orders = {tower: _Order(len(found), generator) for tower, found in rows.items()}
    for step in range(1, settings.steps + 1):
        student, wanted = [], []
        for tower, fake in fakes.items():
            picked = orders[tower].next(settings.batch)
            student.append(fake(torch.from_numpy(rows[tower][picked]).to(device)))
            wanted.append(targets[tower][picked].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss_of(torch.cat(student), torch.cat(wanted)).backward()
        optimizer.step()
        schedule.step()
        for fake in fakes.values():
            fake.keep_within()
        if step % every == 0 or step == settings.steps:
            for tower, fake in fakes.items():
                found = _judge(fake, ready[tower], device)
                if found < best[tower]:
                    best[tower], kept[tower] = found, copy.deepcopy(fake.state_dict())
    for tower, fake in fakes.items():
        fake.load_state_dict(kept[tower])
        fake.cpu()
    return before, best


class _Order:
    """Rows in a random order, all of them before any comes again."""

    def __init__(self, count: int, generator: np.random.Generator) -> None:
        self._count, self._generator = count, generator
        self._left: NDArray[np.int64] = np.zeros(0, np.int64)

    def next(self, batch: int) -> NDArray[np.int64]:
        while len(self._left) < batch:
            self._left = np.concatenate([self._left, self._generator.permutation(self._count)])
        picked, self._left = self._left[:batch], self._left[batch:]
        return picked


def _groups(fake: FakeQuantized, settings: Finetune) -> list[dict[str, Any]]:
    """One group of parameters a tensor: folded batch norms leave weights of very different size."""
    convolutional = sum(node.target in CONVOLUTIONS for node in fake.graph_module.graph.nodes) > STEM_LAYERS
    rate, coarse = settings.rate * (_CONVOLUTIONAL if convolutional else 1.0), fake.coarse_weights()
    groups: list[dict[str, Any]] = []
    for name, weight in fake.weights().items():
        size = max(float(weight.detach().square().mean().sqrt()), _SMALLEST)
        groups.append({"params": [weight], "lr": size * (settings.rate * _COARSE if name in coarse else rate)})
    if len(fake.log_scales):
        groups.append({"params": list(fake.log_scales.values()), "lr": settings.scale_rate})
    return groups


def _objectives(width: int, settings: Finetune) -> Callable[[Tensor, Tensor], Tensor]:
    """(rows of the fake-quantized towers [N, D], of the float ones [N, D]) -> loss. The pictures' and the texts' rows
    lie under each other, so that the relations of each with both are kept."""
    widths = Widths(width)
    parts: list[tuple[float, nn.Module]] = []
    if settings.feature:
        options: dict[str, Any] = {"distance": "cosine", "text": 0.0}
        parts.append((settings.feature, build_objective("feature", student=widths, teacher=widths, **options)))
    if settings.relation:
        parts.append((settings.relation, build_objective("gram", student=widths, teacher=widths, of="image")))

    def loss(student: Tensor, wanted: Tensor) -> Tensor:
        own, float_rows = Outputs(image=student), Outputs(image=wanted)
        terms = [w * t for w, part in parts for t in part(student=own, teacher=float_rows).values()]
        return torch.stack(terms).sum()

    return loss


def _judge(fake: FakeQuantized, ready: Prepared, device: torch.device) -> float:
    found = run_module(lambda rows: fake(rows.to(device)).cpu(), ready.held)
    return 1 - fidelity(found, ready.expected).mean


def _notes(settings: Finetune, rows: int, before: float, after: float, seconds: float) -> dict[str, object]:
    return {
        "steps": settings.steps,
        "batch": settings.batch,
        "objectives": {"feature": settings.feature, "gram": settings.relation},
        "rows": rows,
        "seed": settings.seed,
        "held_out_1_minus_cosine_before": float(f"{before:.4g}"),
        "held_out_1_minus_cosine_after": float(f"{after:.4g}"),
        "kept": after < before,
        "seconds": round(seconds, 1),
    }
