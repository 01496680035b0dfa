"""A projection's closed-form start: ridge regression from frozen features to the embeddings wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.image import ProjectionHead


@torch.no_grad()
def fit_projection(
    head: ProjectionHead, features: Tensor, targets: Tensor, *, ridge: float = 1.0, widths: Sequence[int] = ()
) -> None:
    """Set a linear projection to the ridge solution, in place; training may go on from there.

    Formula: x = (f - mean f) / s, s the root mean square over a part's channels of their standard deviations, each
    part of `widths` also divided by the root of its width (so that parts count alike however wide they are);
    W = argmin |x W - (t - mean t)|^2 + lambda |W|^2 with lambda = `ridge` times the mean of |x|^2; solved in float64 on
    the n x n or the F x F side, whichever is smaller. All of it is folded into the head: a batch norm takes mean and
    variance, the linear layer the rest, so that `head(features)` in eval mode predicts t.

    Source: a linear map from any model's features into CLIP's space is Text-to-Concept's (ICML 2023),
    fitted there by SGD on features of a common variance; the closed form, its scaling and its penalty are ours.

    Why not each channel by its own deviation: rounding to int8 adds the same noise to every channel of a tensor, so a
    channel made louder makes its noise louder. Per-channel scaling cost a shipped file 1 - cosine of 0.3; the penalty
    in the tensor's own units is what regression with equal noise on all inputs asks for (Bishop 1995, noise as
    Tikhonov regularisation).

    Args:
        features: [n, F] of the trunk in eval mode. targets: [n, D].
        widths: of the features' parts (`ImageTower.widths`).

    Raises:
        UsageError: not a linear head with a bias, a row norm in front, or shapes that do not fit.
    """
    norm, linear = head.norm, head.first
    batch = isinstance(norm, torch.nn.BatchNorm1d)
    if (
        not isinstance(head.second, torch.nn.Identity)
        or linear.bias is None
        or not (batch or isinstance(norm, torch.nn.Identity))
    ):
        raise UsageError(
            "a closed-form start was asked of a projection that is not linear with a bias after a batch norm or none; "
            "it has no closed form, so set projection.kind to 'linear', bias to true and norm to 'batch' or 'none'"
        )
    n, width = features.shape
    if n < 2 or (width, targets.shape[1]) != (linear.in_features, linear.out_features) or len(targets) != n:
        raise UsageError(
            f"a projection of {linear.in_features} to {linear.out_features} was to be fitted from features "
            f"{list(features.shape)} to targets {list(targets.shape)}; give both for the same 2 or more rows"
        )
    parts = tuple(widths) or (width,)
    f, t = features.double(), targets.double()
    mean, std = f.mean(dim=0), f.std(dim=0, correction=0)
    spread = torch.cat([s.square().mean().sqrt().clamp(min=1e-12).expand(len(s)) for s in std.split([*parts])])
    weight = torch.cat([f.new_full((w,), w**-0.5) for w in parts])
    x, y = (f - mean) / spread * weight, t - t.mean(dim=0)
    strength = ridge * float(x.square().sum(dim=1).mean())
    if n <= width:
        solution = x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(n).to(x), y)
    else:
        solution = torch.linalg.solve(x.T @ x + strength * torch.eye(width).to(x), x.T @ y)
    matrix = (weight[:, None] * solution).T
    if batch:
        assert norm.running_mean is not None, "ProjectionHead's batch norm keeps statistics"
        assert norm.running_var is not None, "ProjectionHead's batch norm keeps statistics"
        norm.reset_parameters()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(std.square())
        linear.weight.copy_(matrix * (std.square() + norm.eps).sqrt() / spread)
        linear.bias.copy_(t.mean(dim=0))
    else:
        linear.weight.copy_(matrix / spread)
        linear.bias.copy_(t.mean(dim=0) - matrix @ (mean / spread))
