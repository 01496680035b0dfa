"""Training a generative model on scenes, for a number of steps or for a time."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.distill.checkpoint import (
    SCHEMA,
    check_origin,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    step_of,
)
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.model import Rows, Vlm

# model, what a batch holds beside its rows, pixels, rows; to the loss and the logits [N, V] of `rows.targets`
Loss = Callable[[Vlm, Any, Tensor, Rows], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class VlmTraining:
    """steps, seconds: where training ends, whichever comes first (0: no such end); both drive the cosine of the rate.

    rate: AdamW's, after `warmup` steps. vision_rate, word_rate: factors of it for the vision trunk and the token
    embedding; a trunk at 0 stands still and costs no gradients. Batch norms of a trunk with loaded weights always keep
    their statistics. bfloat16: autocast.
    """

    steps: int = 0
    seconds: float = 0.0
    rate: float = 1e-3
    vision_rate: float = 0.0
    word_rate: float = 0.3
    weight_decay: float = 0.05
    warmup: int = 200
    clip: float = 1.0
    bfloat16: bool = False
    log_every: int = 50

    def __post_init__(self) -> None:
        if self.steps <= 0 and self.seconds <= 0:
            raise UsageError("training has neither steps nor seconds and would never end; give one of them")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a run that ends by steps is saved, every so many of them, and goes on from.

    recipe, inputs: digests of what it is made with; another run's checkpoint is refused.
    """

    folder: Path
    every: int
    recipe: str
    inputs: str

    @property
    def done(self) -> int:
        """Steps of the newest one, 0 where there is none."""
        newest = latest_checkpoint(self.folder)
        return 0 if newest is None else step_of(newest)


def next_token_loss(model: Vlm, drawn: Any, pixels: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Cross-entropy of answers given their true beginnings, mean over their tokens; and the logits."""
    logits = model(pixels, rows)
    return F.cross_entropy(logits.float(), rows.targets), logits


def train_vlm(
    model: Vlm,
    batches: Iterator[tuple[Any, Rows]],
    composer: Callable[[Any], Tensor],
    training: VlmTraining,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
    *,
    loss_of: Loss = next_token_loss,
    beside: nn.Module | None = None,
    kept: Checkpoints | None = None,
) -> list[dict[str, Any]]:
    """Train in place.

    batches, composer: scenes as numbers with the `Composer` of their table, or anything else with what makes its
    pixels, uint8 [B, S, S, 3] (`conversations.pixels_of`). loss_of: next-token cross-entropy unless given. beside: a
    module that `loss_of` trains along, such as a projector, which the model does without afterwards. kept: go on from
    its newest checkpoint, `batches` beginning at batch `kept.done`, and save to it; for runs that end by steps alone.

    say: told every `log_every` steps: step, seconds, loss and accuracy of answer tokens (means since the last time,
    each given its true predecessors), rate, scenes a second. Returns those rows.

    Raises:
        UsageError: the loss is no number any more, or checkpoints of a run that ends by time.
        IntegrityError: a checkpoint that is damaged or of another run.
    """
    if kept is not None and (training.seconds or not training.steps):
        raise UsageError(
            f"checkpoints were asked of a training that ends after {training.seconds:g} seconds, whose rates would be "
            "others after a kill; give steps alone"
        )
    trunk_moves = training.vision_rate > 0
    model.train()
    model.vision.requires_grad_(trunk_moves)
    if model.config.vision.weights != "none" or not trunk_moves:
        model.vision.eval()
    optimizer = _optimizer(model, training, beside)
    base = [float(group["lr"]) for group in optimizer.param_groups]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if beside is not None:
        weights += list(beside.parameters())
    device = weights[0].device
    history: list[dict[str, Any]] = []
    begun = since = time.monotonic()
    sums, scenes, step = torch.zeros(3, device=device), 0, 0
    generator: Tensor | None = None
    newest = None if kept is None else latest_checkpoint(kept.folder)
    if kept is not None and newest is not None:
        state = load_checkpoint(newest)
        check_origin(state, newest, recipe=kept.recipe, inputs=kept.inputs)
        model.load_state_dict(state["model"])
        if beside is not None:
            beside.load_state_dict(state["beside"])
        optimizer.load_state_dict(state["optimizer"])
        step, sums, history = int(state["step"]), state["sums"].to(device), json.loads(state["history"])
        generator = state["generator"]
    while True:
        ahead = max(
            step / training.steps if training.steps else 0.0,
            (time.monotonic() - begun) / training.seconds if training.seconds else 0.0,
        )
        if ahead >= 1:
            break
        drawn, rows = next(batches)
        if generator is not None:
            # a loader has drawn from it by now
            torch.set_rng_state(generator)
            generator = None
        factor = min(1.0, (step + 1) / max(training.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * ahead))
        for group, rate in zip(optimizer.param_groups, base):
            group["lr"] = rate * factor
        pixels = composer(drawn)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.bfloat16):
            loss, logits = loss_of(model, drawn, pixels, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, training.clip)
        optimizer.step()
        step, scenes = step + 1, scenes + len(pixels)
        right = (logits.detach().argmax(-1) == rows.targets).float().mean()
        sums += torch.stack([loss.detach(), right, torch.ones_like(right)])
        if step % training.log_every == 0:
            # the only place that waits for the device, which also keeps the clock honest
            total, correct, count = sums.tolist()
            now = time.monotonic()
            row = {
                "step": step,
                "seconds": round(now - begun, 1),
                "loss": round(total / count, 4),
                "token_accuracy": round(correct / count, 4),
                "rate": training.rate * factor,
                "scenes_per_second": round(scenes / (now - since), 1),
            }
            if not math.isfinite(row["loss"]):
                raise UsageError(f"the loss is {row['loss']} at step {step}, so nothing more is learnt; lower the rate")
            history.append(row)
            say(row)
            sums, scenes, since = torch.zeros(3, device=device), 0, now
        if kept is not None and (step % kept.every == 0 or step == training.steps):
            state = {
                "schema": SCHEMA, "recipe": kept.recipe, "inputs": kept.inputs, "step": step,
                "model": model.state_dict(), "beside": None if beside is None else beside.state_dict(),
                "optimizer": optimizer.state_dict(), "sums": sums.cpu(), "history": json.dumps(history),
                "generator": torch.get_rng_state(),
            }  # fmt: skip
            save_checkpoint(kept.folder, step, state, keep=1)
    model.requires_grad_(True)
    model.eval()
    return history


def _optimizer(model: Vlm, training: VlmTraining, beside: nn.Module | None = None) -> torch.optim.AdamW:
    """Matrices decay; norms, biases, places and the token embedding do not."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for weight in () if beside is None else beside.parameters():
        groups.setdefault((1.0, 0.0 if weight.ndim < 2 else training.weight_decay), []).append(weight)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        words = name == "decoder.embed_tokens.weight"
        factor = training.word_rate if words else training.vision_rate if name.startswith("vision.") else 1.0
        plain = words or weight.ndim < 2 or name == "connector.places"
        groups.setdefault((factor, 0.0 if plain else training.weight_decay), []).append(weight)
    rows = [
        {"params": weights, "lr": training.rate * factor, "weight_decay": decay}
        for (factor, decay), weights in groups.items()
    ]
    return torch.optim.AdamW(rows, betas=(0.9, 0.98), fused=next(model.parameters()).device.type == "cuda")
