"""Which blocks stay in float in a file of precision "mixed": a plan that people can read, and every target honours.

A plan is JSON. `keep` alone takes effect; the rest says for whom it was made, for what, and why:

    {"schema": "1.0", "student": "lite0-minilm2-...", "contract_sha256": "...", "budget": "r@5 -0.5",
     "keep": {"image": ["trunk.blocks.0.0"], "text": []}, "why": {...}, "measured_on": "..."}

A block is a module of a tower by its path in it, and everything inside (`export.graphs`). `contract_sha256` binds a
plan to one student with its weights; null makes it good for any that has such blocks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import UsageError, VersionError, unknown_name
from pocketvlm.export.graphs import block_name

SCHEMA = "1.0"
# where a bundle keeps the plan of its mixed variants
PLAN_FILE = "mixed.json"
_TOWERS = ("image", "text")


@dataclass(frozen=True)
class Plan:
    """keep: tower -> its blocks in float. student, contract_sha256: for whom; None for any. budget: what it had to
    meet. why: what each block costs, and did when it alone was quantized. measured_on: the sample."""

    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    student: str | None = None
    contract_sha256: str | None = None
    budget: str | None = None
    why: Mapping[str, Any] = field(default_factory=dict)
    measured_on: str | None = None

    def blocks(self, tower: str) -> tuple[str, ...]:
        """What stays in float of one tower."""
        return tuple(self.keep.get(tower, ()))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {"schema": SCHEMA, **asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def check(self, contract: ModelContract, towers: Mapping[str, nn.Module | None]) -> None:
        """Refuse a plan that does not fit a student.

        Raises:
            UsageError: made for another student or other weights, or it names a tower that is not there.
            UnknownNameError: a block that the tower does not have, with the nearest that it has.
        """
        if self.contract_sha256 not in (None, contract.digest()):
            raise UsageError(
                f"the plan was made for {self.student or 'a student'!r} (contract {str(self.contract_sha256)[:12]}) "
                f"and {contract.model_id!r} (contract {contract.digest()[:12]}) was given, for whose weights nothing "
                "of it was measured; make one with 'pocketvlm quantize', or set contract_sha256 to null to use it all "
                "the same"
            )
        for tower, blocks in self.keep.items():
            module = towers.get(tower)
            if module is None and blocks:
                raise UsageError(
                    f"the plan keeps {', '.join(blocks)} of the {tower} tower in float, and this model has no such "
                    "tower; take the entry out of the plan"
                )
            known = known_blocks(module) if module is not None else ()
            for block in blocks:
                if block not in known:
                    raise unknown_name(f"block of the {tower} tower in the plan", block, known)


def known_blocks(module: nn.Module) -> list[str]:
    """Every module of a tower that holds weights which could be quantized, by its path."""
    found: dict[str, None] = {}
    for path, parameter in module.named_parameters():
        if parameter.ndim < 2:
            continue
        parts = block_name(path).split(".")[:-1]
        found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return list(found)


def load_plan(path: str | Path) -> Plan:
    """Read a plan, written by `Plan.save` or by hand.

    Raises:
        UsageError: absent, not JSON, or not of this form. UnknownNameError: a key or tower that plans do not have.
        VersionError: of a newer release.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"plan {file} cannot be read ({error.strerror}), so nothing was exported") from error
    except ValueError as error:
        raise UsageError(f"plan {file} is not JSON ({error}), so nothing was exported; repair it") from error
    if not isinstance(content, dict) or not isinstance(content.get("keep"), dict):
        raise UsageError(
            f"plan {file} has no 'keep' with the blocks of each tower, so nothing of it could be honoured; write "
            '{"schema": "1.0", "keep": {"image": [...], "text": [...]}}'
        )
    if str(content.pop("schema", SCHEMA)).split(".")[0] != SCHEMA.split(".")[0]:
        raise VersionError(f"plan {file} is of another schema than {SCHEMA}, which this release reads; upgrade")
    for key in content:
        if key not in Plan.__dataclass_fields__:
            raise unknown_name("key in the plan", key, [*Plan.__dataclass_fields__, "schema"])
    for tower, blocks in content["keep"].items():
        if tower not in _TOWERS:
            raise unknown_name("tower in the plan", tower, _TOWERS)
        if not isinstance(blocks, list) or not all(isinstance(block, str) and block for block in blocks):
            raise UsageError(
                f"plan {file} gives {blocks!r} for the {tower} tower and a list of block names is expected, so nothing "
                'was exported; write for instance ["blocks.0"]'
            )
    keep = {tower: tuple(blocks) for tower, blocks in content.pop("keep").items()}
    return Plan(keep, **content)


def kept(plan: Plan | None, tower: str) -> Collection[str]:
    """A plan's blocks of one tower; none without a plan."""
    return plan.blocks(tower) if plan is not None else ()
