"""ListMLE, the likelihood of a ranking, with ties that depend on nothing but the values."""

from __future__ import annotations

import torch
from torch import Tensor

# in units of a cosine: above float32's rounding of one, far below any difference that a model means
TIE = 1e-6


def list_mle(scores: Tensor, order_by: Tensor, *, top: int | None = None) -> Tensor:
    """Negative log likelihood (Plackett-Luce) that drawing items by `scores` gives the order of `order_by`, per row.

    Formula: items of a row sorted by `order_by`, best first; with x_k the score of the k-th,
        L = sum_k w_k [ log sum_{m not ahead of k} exp(x_m) - x_k ].
    scores, order_by: [R, N]; result [R]. Only `scores` get a gradient. top: only the best so many items are terms of
    the sum (every item stays in the denominators); w_k is 1 for those and 0 for the rest.
    Source: Xia et al. 2008, "Listwise approach to learning to rank" (ListMLE); `top` is its top-k form.
    Ours, ties: items whose neighbours in the order differ by at most `TIE` are ahead of none of their group, so they
    share one denominator (Breslow's form in survival analysis), and a group that `top` cuts shares the places that
    are left, w = places / size. The value then depends neither on a random state nor on the order of the rows.
    Computed by a cumulative logsumexp: nothing overflows or is lost at a logit scale of 100. Memory O(R N).
    """
    ranked, order = order_by.detach().sort(dim=-1, descending=True)
    x = scores.gather(-1, order)
    place = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[:, 1:] = ranked[:, :-1] - ranked[:, 1:] > TIE
    start = torch.where(fresh, place, 0).cummax(dim=-1).values
    losses = x.flip(-1).logcumsumexp(dim=-1).flip(-1).gather(-1, start) - x
    if top is None or top >= x.shape[-1]:
        return losses.sum(dim=-1)
    group = fresh.cumsum(dim=-1) - 1
    size = torch.zeros_like(group).scatter_add(-1, group, torch.ones_like(group)).gather(-1, group)
    share = ((top - start).to(x.dtype) / size).clamp(0.0, 1.0)
    return (share * losses).sum(dim=-1)
