"""What a checkpoint holds of a run, and how a run goes on from it, with any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketvlm.distill import optim
from pocketvlm.distill.checkpoint import SCHEMA, check_origin
from pocketvlm.edge.errors import IntegrityError

if TYPE_CHECKING:
    from pocketvlm.distill.loop import Trainer


def state_of(trainer: Trainer, data: list[Any]) -> dict[str, Any]:
    """Everything that decides the next step, as tensors and plain values. data: where that of each rank stands."""
    return {
        "schema": SCHEMA,
        "recipe": trainer.recipe.digest(),
        "inputs": trainer.prepared.digest,
        "step": trainer.step,
        "student": trainer.student.state_dict(),
        "average": trainer.average.state_dict() if trainer.average is not None else None,
        "start": trainer.beginning,
        "balance": trainer.balance.state_dict() if trainer.balance is not None else None,
        "objectives": trainer.objectives.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict() if trainer.scaler else None,
        "guard": trainer.guard.state_dict(),
        "rng": optim.rng_state(trainer.device),
        "data": data,
        "last": trainer.last,
    }


def restore(trainer: Trainer, state: Mapping[str, Any], path: Path) -> None:
    """Continue from what `state_of` returned, which lay at `path`.

    Raises:
        IntegrityError: it was made by another release, recipe, data, tokenizer or teacher, or from a stream that was
            dealt to another number of ranks.
    """
    check_origin(state, path, recipe=trainer.recipe.digest(), inputs=trainer.prepared.digest)
    trainer.student.load_state_dict(state["student"])
    trainer.objectives.load_state_dict(state["objectives"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.average is not None:
        trainer.average.load_state_dict(state["average"])
    if trainer.beginning is not None:
        trainer.beginning = {name: value.to(trainer.device) for name, value in state["start"].items()}
        if trainer.beside.original is not None:
            tower = "image_tower."
            own = {k.removeprefix(tower): v for k, v in trainer.beginning.items() if k.startswith(tower)}
            trainer.beside.original.load_state_dict(own)
    if trainer.balance is not None:
        trainer.balance.load_state_dict(state["balance"])
    if trainer.scaler:
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.guard.load_state_dict(state["guard"])
    optim.set_rng_state(state["rng"], trainer.device)
    data = state["data"]
    if data[0] is not None and len(data) != trainer.ranks.count:
        raise IntegrityError(
            f"checkpoint {path} was made by {len(data)} ranks, of which each read its own shards of the stream, and "
            f"this run has {trainer.ranks.count}, so samples would be repeated and missed; continue with {len(data)}"
        )
    trainer.feed.load_state_dict(data[min(trainer.ranks.rank, len(data) - 1)])
    trainer.step, trainer.last = int(state["step"]), dict(state["last"])
