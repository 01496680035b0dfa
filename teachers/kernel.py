"""Kernel ridge regression from image features to sentence embeddings, in closed form.

This is the whole trained part of the built-in teacher: a second on a CPU, no seeds, no schedule. It scored above
linear and MLP heads trained with a soft contrastive plus cosine loss on the same pairs (docs/teachers.md).

With feature blocks b of width w_b, each standardised on the training pictures and divided by sqrt(w_b), joined to
x and scaled to unit length:

    k(x, z) = (1 + x . z)^degree
    alpha   = (K + ridge * mean(diag K) * I)^-1 Y        K: [m, m], Y: [m, D]
    f(x)    = sum_i k(x, x_i) alpha_i
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# a logit scale is chosen from these by the leave-one-out likelihood
_SCALES = tuple(float(s) for s in (5, 7, 10, 14, 20, 28, 40, 56))


@dataclass(frozen=True)
class KernelOptions:
    """degree of the kernel's polynomial; ridge relative to the kernel's mean diagonal."""

    degree: int = 4
    ridge: float = 1.0


class KernelRidge(nn.Module):
    """The fitted map: [B, F] features to [B, D] (not normalised). All state is in buffers, float32."""

    mean: Tensor
    scale: Tensor
    support: Tensor
    alpha: Tensor

    def __init__(self, state: dict[str, Tensor], degree: int) -> None:
        super().__init__()
        for name in ("mean", "scale", "support", "alpha"):
            self.register_buffer(name, state[name])
        self.degree = degree

    def forward(self, features: Tensor) -> Tensor:
        x = F.normalize((features - self.mean) * self.scale, dim=-1)
        return (1 + x @ self.support.T).pow(self.degree) @ self.alpha


@dataclass(frozen=True)
class Fit:
    """state: for `KernelRidge`; logit_scale: chosen on held-out predictions; recall5: leave-one-out R@5, 0..1."""

    state: dict[str, Tensor]
    logit_scale: float
    recall5: float


def fit_kernel_ridge(features: Tensor, targets: Tensor, widths: Sequence[int], options: KernelOptions) -> Fit:
    """Fit in float64.

    features: [n, V, F], V views of each picture. targets: [n, D] unit vectors. widths: sizes of the feature
    blocks, summing to F.

    The logit scale minimises the symmetric cross-entropy of every picture's prediction *made without it*
    against all n targets: with G = (K + ridge I)^-1 and the rows g of one picture, the prediction without them
    is Y_g - (G_gg)^-1 (G Y)_g.
    """
    n, views, _ = features.shape
    rows = features.double().flatten(0, 1)
    y = targets.double().repeat_interleave(views, 0)
    mean, std = rows.mean(0), rows.std(0) + 1e-3
    block = torch.cat([rows.new_full((w,), w**-0.5) for w in widths])
    scale = block / std
    support = F.normalize((rows - mean) * scale, dim=-1)
    kernel = (1 + support @ support.T).pow(options.degree)
    ridge = options.ridge * kernel.diagonal().mean()
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(kernel)).to(kernel))
    alpha = inverse @ y

    blocks = inverse.view(n, views, n, views)[torch.arange(n), :, torch.arange(n), :]
    error = torch.linalg.solve(blocks, alpha.view(n, views, -1))
    held_out = F.normalize(targets.double() - error[:, 0], dim=-1)
    cosine = held_out @ targets.double().T
    label = torch.arange(n, device=cosine.device)
    losses = [F.cross_entropy(s * cosine, label) + F.cross_entropy(s * cosine.T, label) for s in _SCALES]
    best = _SCALES[int(torch.stack(losses).argmin())]
    rank = (cosine > cosine.diagonal()[:, None]).sum(1)
    state = {"mean": mean, "scale": scale, "support": support, "alpha": alpha}
    return Fit({k: v.float() for k, v in state.items()}, best, float((rank < 5).double().mean()))
