"""Which blocks must stay in float so that a quantized ONNX variant meets its budgets: found by trying, not exporting.

Both files are cut at the recorded taps and run block by block, each block from the one file or the other. Judged are
every case and the whole task, by the budgets of the reduced precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.export.budgets import PrecisionBudgets, load_budgets
from pocketvlm.export.compare import row_error
from pocketvlm.export.onnx_blocks import OnnxBlocks, Rows
from pocketvlm.export.parity_depth import cut_tower, tower_inputs
from pocketvlm.export.parity_stages import Outputs, guarded, stage_task, stage_towers
from pocketvlm.export.reference_run import ReferenceRun, load_reference

# the part of a tower after its last tap
_END = "output"
_BATCH = 32


@dataclass
class Bisection:
    """keep: "text blocks.0", the fewest blocks in float with which nothing fails; None where even all do not suffice.

    No block of the list can be left out. blocks: every block and its own error (1 - cosine, fed with the full-precision
    value before it), worst first. tried: how many lists were judged. message: what failed without any, and the verdict.
    """

    variant: str
    keep: list[str] | None
    blocks: dict[str, float]
    tried: int
    message: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def bisect_precision(
    bundle_folder: str | Path, reference_folder: str | Path, variant: str, *, budgets: str | Path | None = None
) -> Bisection:
    """Find the fewest blocks of `variant` ("onnx:int8") that must stay in float.

    Blocks are ranked by their own error; the shortest sufficient prefix of that ranking is found by halving, and then
    every member that is not needed is dropped. Batch norms that were folded and layers that were balanced stay as they
    are in each file; biases that were corrected for int8 before them are not corrected anew.

    Raises:
        UsageError: not an ONNX variant of reduced precision, or no onnx fp32 variant beside it.
        UnknownNameError: the bundle has no such variant.
    """
    bundle, reference = Bundle.load(bundle_folder), load_reference(reference_folder)
    chosen, full = _variants(bundle, variant)
    limits = load_budgets(budgets).for_precision(chosen.precision)
    towers = {name: _Tower(bundle, chosen, full, reference, name) for name in ("image", "text")}
    own = {f"{name} {block}": error for name, tower in towers.items() for block, error in tower.own.items()}
    ranked = sorted(own, key=lambda block: -own[block])
    trial = _Trial(bundle, chosen, reference, limits, towers)

    failure = trial.failure([])
    if not failure:
        return Bisection(variant, [], _ordered(own), trial.tried, "every block may be quantized: nothing fails")
    if rest := trial.failure(ranked):
        return Bisection(variant, None, _ordered(own), trial.tried, f"even with every block in float: {rest}")
    low, high = 0, len(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if not trial.failure(ranked[:middle]) else (middle, high)
    keep = ranked[:high]
    for block in reversed(keep[:-1]):
        # the last one is needed: without it the prefix failed
        fewer = [other for other in keep if other != block]
        if not trial.failure(fewer):
            keep = fewer
    message = f"{len(keep)} of {len(ranked)} blocks must stay in float: {', '.join(keep)}; with none, {failure}"
    return Bisection(variant, keep, _ordered(own), trial.tried, message)


def _ordered(own: dict[str, float]) -> dict[str, float]:
    return dict(sorted(own.items(), key=lambda item: -item[1]))


def _variants(bundle: Bundle, name: str) -> tuple[BundleVariant, BundleVariant]:
    target, _, precision = name.partition(":")
    known = {f"{v.target}:{v.precision}": v for v in bundle.variants}
    if name not in known:
        raise unknown_name("variant of this bundle", name, known)
    if target != "onnx" or precision == "fp32":
        raise UsageError(
            f"variant {name!r} was given to bisect, which needs an ONNX file of reduced precision: other files cannot "
            "be run block by block, and full precision has nothing to keep; give for instance onnx:int8"
        )
    chosen = known[name]
    full = next((v for v in bundle.variants if (v.target, v.precision, v.dim) == ("onnx", "fp32", chosen.dim)), None)
    if full is None:
        raise UsageError(
            f"the bundle has no onnx fp32 variant beside {name!r}, so there is no block in float to put in its place; "
            "export with onnx:fp32 too"
        )
    return chosen, full


class _Tower:
    """One tower as a chain of blocks, each of which can be run from either file. own: block -> its own error."""

    def __init__(
        self, bundle: Bundle, chosen: BundleVariant, full: BundleVariant, reference: ReferenceRun, tower: str
    ) -> None:
        exact, other = (OnnxBlocks(bundle.path(variant.files[tower])) for variant in (full, chosen))
        cuts = cut_tower(exact, other, reference, tower)
        # two taps at one value are one cut
        kept = [i for i in range(len(cuts.taps)) if i == 0 or cuts.full[i] != cuts.full[i - 1]]
        self.names = [*(cuts.taps[i] for i in kept), _END]
        ends = {
            True: [*(cuts.full[i] for i in kept), exact.output],
            False: [*(cuts.other[i] for i in kept), other.output],
        }
        self._run = {
            in_float: [blocks.segment(start, end) for start, end in zip([None, *ends[in_float]], ends[in_float])]
            for in_float, blocks in ((True, exact), (False, other))
        }
        rows = tower_inputs(reference, tower)
        self.own: dict[str, float] = {}
        before: list[Rows | None] = [None] * len(rows)
        for index, name in enumerate(self.names):
            truth, found = (
                [self._run[float_][index](row, value) for row, value in zip(rows, before)] for float_ in (True, False)
            )
            pairs = zip(truth, found)
            self.own[name] = float(np.mean([row_error(a.reshape(1, -1), b.reshape(1, -1))[0] for a, b in pairs]))
            before = list(truth)

    def __call__(self, inputs: Rows, keep: frozenset[str]) -> Rows:
        parts = []
        for start in range(0, len(inputs), _BATCH):
            rows, value = inputs[start : start + _BATCH], None
            for index, name in enumerate(self.names):
                value = self._run[name in keep][index](rows, value)
            parts.append(np.asarray(value, np.float64))
        return np.concatenate(parts)


class _Trial:
    """Judges lists of blocks; a tower that is asked twice for the same blocks is run once."""

    def __init__(
        self,
        bundle: Bundle,
        variant: BundleVariant,
        reference: ReferenceRun,
        limits: PrecisionBudgets,
        towers: dict[str, _Tower],
    ) -> None:
        self.bundle, self.variant, self.reference, self.limits = bundle, variant, reference, limits
        self.towers, self.tried = towers, 0
        self._known: dict[tuple[str, frozenset[str]], list[Rows]] = {}

    def failure(self, keep: list[str]) -> str:
        """What fails first in S3 and S5 with these blocks in float; empty if nothing does."""
        self.tried += 1
        image, task_image = self._answers("image", keep)
        text, task_text, prompt = self._answers("text", keep)
        outputs = Outputs(image, text, task_image, task_text, prompt)
        given = (self.variant, self.reference, self.limits)
        for result in (
            guarded("S3", lambda: stage_towers("S3", self.bundle, outputs, *given)),
            guarded("S5", lambda: stage_task(outputs, *given)[0]),
        ):
            if result.status == "fail":
                return f"{result.stage} ({result.title}): {result.message}"
        return ""

    def _answers(self, tower: str, keep: list[str]) -> list[Rows]:
        blocks = frozenset(name.split(" ", 1)[1] for name in keep if name.split(" ", 1)[0] == tower)
        if (tower, blocks) not in self._known:
            task, arrays = self.reference.task, self.reference.arrays
            inputs = [arrays["pixels"], task.pixels] if tower == "image" else [arrays["ids"], task.ids, task.prompt_ids]
            run = self.towers[tower]
            width = self.reference.contract.embed_dim
            self._known[tower, blocks] = [run(x, blocks) if len(x) else np.zeros((0, width)) for x in inputs]
        return self._known[tower, blocks]
