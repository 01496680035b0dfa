"""Which targets at which precisions an export was asked for, refused before any work where one cannot be had."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.export.mixed import Plan
from pocketvlm.export.precision import PRECISIONS
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.base import Calibration, Target, check_precision


def wanted_variants(targets: Sequence[str | Target], precisions: Sequence[str] | None) -> list[tuple[Target, str]]:
    """(backend, precision) pairs; every backend is opened here, so that a missing extra shows before any work."""
    if isinstance(targets, str):
        targets = (targets,)
    for precision in precisions or ():
        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
    plan: list[tuple[Target, str]] = []
    refusals: dict[str, str] = {}
    for entry in targets:
        if not isinstance(entry, str):
            plan += [(entry, precision) for precision in entry.precisions]
            continue
        name, _, only = entry.partition(":")
        target = get_target(name)
        asked = [only] if only else target.defaults if precisions is None else precisions
        if only and only not in PRECISIONS:
            raise unknown_name("precision", only, PRECISIONS)
        refused = [p for p in asked if p not in target.precisions]
        if len(refused) == len(asked):
            raise UsageError(
                f"target {name!r} writes {', '.join(target.precisions)} and {', '.join(refused) or 'nothing'!r} was "
                f"asked for{_because(target, refused)}; it would be missing from the bundle, so choose another "
                "precision or leave the target out"
            )
        refusals |= {p: f"{name} writes {', '.join(target.precisions)}{_because(target, [p])}" for p in refused}
        plan += [(target, precision) for precision in target.precisions if precision in asked]
    lacking = sorted(set(refusals) - {precision for _, precision in plan})
    if lacking:
        raise UsageError(
            f"no chosen target writes precision {lacking[0]}: {refusals[lacking[0]]}; the bundle would lack it, so add "
            "a target that writes it or leave it out"
        )
    if not plan:
        raise UsageError("no target was chosen, so there is nothing to export; name onnx, executorch or coreml")
    return list({(target.name, precision): (target, precision) for target, precision in plan}.values())


def check_plan_is_used(plan: Plan | None, wanted: list[tuple[Target, str]]) -> None:
    """Before the model is opened, which takes longer."""
    mixed = [target for target, precision in wanted if precision == "mixed"]
    if mixed and plan is None:
        check_precision(mixed[0], "mixed", Calibration(np.zeros(0), np.zeros(0), ""), None)
    if plan is not None and not mixed:
        raise UsageError(
            "a plan was given and no chosen precision is mixed, so the plan would change nothing; add mixed to the "
            "precisions or leave the plan out"
        )


def _because(target: Target, refused: Sequence[str]) -> str:
    return f" ({target.refused[refused[0]]})" if refused else ""
