"""A student for one task: two linear heads over the image features, and the one classifier that is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError

Mix = Literal["probabilities", "logits"]
SHARES = tuple(round(0.05 * step, 2) for step in range(21))
TEMPERATURES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


class Classes(NamedTuple):
    """The classes of a task. labels: their names, in the order of the logits. templates: prompts with "{}" by which a
    teacher reads a name. mix: what is mixed, the heads' probabilities or their logits."""

    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("{}",)
    mix: Mix = "probabilities"


class ClassHeads(nn.Module):
    """Features [B, F] -> logits [B, K] of the head that learns from labels, g_c, and of the one that is taught, g_k.

    Inference (DHO, 2505.07675), with a = `share` and b = `temperature`:
        mix "probabilities":  p = (1 - a) softmax(g_c) + a softmax(g_k / b)
        mix "logits":         p = softmax((1 - a) g_c + a g_k)                    (ours; b is 1)
    The second is one linear layer. Both heads start at 0, so that every run, rank and seed has one start.
    """

    share: Tensor
    temperature: Tensor

    def __init__(self, width: int, classes: Classes) -> None:
        super().__init__()
        if len(set(classes.labels)) < 2 or len(set(classes.labels)) != len(classes.labels):
            raise UsageError(
                f"a classifier was asked for over the classes {list(classes.labels)} and needs at least two different "
                "ones; it would have nothing to tell apart, so name more classes, each once"
            )
        self.classes = classes
        self.label_head, self.taught_head = (nn.Linear(width, len(classes.labels)) for _ in range(2))
        for head in (self.label_head, self.taught_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.register_buffer("share", torch.tensor(0.5))
        self.register_buffer("temperature", torch.tensor(1.0 if classes.mix == "logits" else 0.5))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.label_head(features), self.taught_head(features)

    def mixed(self, features: Tensor) -> Tensor:
        """Logits [B, K] whose softmax is p above: with mix "probabilities" they are log p."""
        label, taught = self(features)
        return mixed_logits(label, taught, float(self.share), float(self.temperature), self.classes.mix)

    def deployed(self) -> nn.Module:
        """What ships, [B, F] -> [B, K] logits as `mixed` gives: one linear layer wherever that is the same function.

        That is so with mix "logits", and where all weight lies on one head; otherwise both heads ship.
        """
        a, b = float(self.share), float(self.temperature)
        if self.classes.mix == "logits" or a in (0.0, 1.0):
            return self._folded(1 - a, a / b)
        return _Mixture(self.label_head, self.taught_head, a, b)

    @torch.no_grad()
    def _folded(self, label: float, taught: float) -> nn.Linear:
        own = self.label_head.weight
        layer = nn.Linear(own.shape[1], own.shape[0]).to(own)
        for name in ("weight", "bias"):
            # in float64, so that folding rounds once
            parts = [getattr(head, name).double() for head in (self.label_head, self.taught_head)]
            getattr(layer, name).copy_(label * parts[0] + taught * parts[1])
        return layer


class _Mixture(nn.Module):
    def __init__(self, label_head: nn.Linear, taught_head: nn.Linear, share: float, temperature: float) -> None:
        super().__init__()
        self.label_head, self.taught_head = label_head, taught_head
        self.share, self.temperature = share, temperature

    def forward(self, features: Tensor) -> Tensor:
        first = self.label_head(features).softmax(dim=-1)
        second = (self.taught_head(features) / self.temperature).softmax(dim=-1)
        # a probability that rounds to 0 in float32 has no logarithm
        return ((1 - self.share) * first + self.share * second).clamp_min(1e-30).log()


def mixed_logits(label_logits: Tensor, taught_logits: Tensor, share: float, temperature: float, mix: Mix) -> Tensor:
    """Logits [..., K] of the mixture of two heads, both [..., K]; see `ClassHeads`."""
    if mix == "logits":
        return (1 - share) * label_logits + share / temperature * taught_logits
    first, second = label_logits.log_softmax(dim=-1), (taught_logits / temperature).log_softmax(dim=-1)
    if share in (0.0, 1.0):
        return second if share else first
    weights = torch.tensor([1 - share, share], dtype=first.dtype, device=first.device).log()
    return torch.logsumexp(torch.stack([first + weights[0], second + weights[1]]), dim=0)


def choose_mixing(
    label_logits: Tensor, taught_logits: Tensor, label: Tensor, mix: Mix, shares: Sequence[float] = SHARES
) -> tuple[float, float]:
    """(share, temperature) of the published grid that does best on rows whose labels no head has learned.

    label_logits, taught_logits: [N, K], N at least 1. label: int64 [N]. Best: the most right answers; among equals,
    which are many on a few rows, the highest mean log-probability of the right class (ours), then the first.
    """
    best: tuple[float, float, float, float] | None = None
    for share in shares:
        for temperature in (1.0,) if mix == "logits" else TEMPERATURES:
            logits = mixed_logits(label_logits.double(), taught_logits.double(), share, temperature, mix)
            right = float((logits.argmax(dim=-1) == label).double().mean())
            sure = float(logits.log_softmax(dim=-1).gather(1, label[:, None]).mean())
            if best is None or (right, sure) > best[:2]:
                best = (right, sure, share, temperature)
    assert best is not None, "the grid is not empty"
    return best[2], best[3]
