"""What a visual teacher sees, predicted from inside a generative student: auxiliary embedding distillation, OLA-style.

OLA-VLM (arXiv:2412.09585, later VisPer-LM), from its authors' code (ola_vlm/model/language_model/base_ola_vlm.py and
ola_utils.py): at chosen decoder layers a predictor turns hidden states into a visual encoder's embedding t, and

    L = sum over layers of  smooth_l1(e, t) + 0.3 InfoNCE(n(e), n(t))

is added to the next-token loss of the first training stage. smooth_l1 has beta 1 and is a mean over all numbers;
InfoNCE is cross-entropy over the batch with a learnt scale, exp(s), s from 2.0, at most 100. The weight 0.3 is
found in configurations of others that build on it; the authors' code takes it from a file that was not seen.

Ours: the predictor (one learnt query over the visual tokens, then two layers with GELU) in the place of the paper's
perceiver resampler with task tokens; one vector for a picture; no special tokens in the student; duplicates of a target
in a batch count as right, too. Predictor and scale are for training only; the student ships as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.build import seeded
from pocketvlm.students.vlm.model import Vlm

CONTRASTIVE = 0.3
_LARGEST_SCALE = 100.0
_FIRST_SCALE = 2.0


class LayerStates:
    """Outputs [B, T, W] of chosen decoder layers during the last forward pass, first layer 0; see `layer_states`."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.found: dict[int, Tensor] = {}

    def visual(self, text: int) -> list[Tensor]:
        """[B, K, W] of each layer: the picture's places, which stand between the beginning and `text` tokens (T of the
        rows).

        Raises:
            UsageError: the model has not run since.
        """
        if len(self.found) != len(self.layers):
            raise UsageError(
                "hidden states of inner layers were asked for, but the model has not run inside layer_states; call it "
                "there first"
            )
        return [self.found[layer][:, 1 : self.found[layer].shape[1] - text] for layer in self.layers]


@contextlib.contextmanager
def layer_states(model: Vlm, layers: Sequence[int]) -> Iterator[LayerStates]:
    """Inside, outputs of these decoder layers are kept from every forward pass over whole texts.

    Raises:
        UsageError: a layer that the decoder does not have, twice the same, or none.
    """
    depth = len(model.decoder.layers)
    if not layers or len(set(layers)) != len(layers) or not all(0 <= layer < depth for layer in layers):
        raise UsageError(
            f"decoder layers {list(layers)} were chosen of {depth}; there is nothing to predict from, so give "
            f"different numbers from 0 to {depth - 1}"
        )
    states = LayerStates(layers)

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            states.found[layer] = given[0]

        return hook

    # what a layer gives is what the norm behind it is given, however the decoder runs its layers
    behind: list[Any] = [*(layer.input_layernorm for layer in list(model.decoder.layers)[1:]), model.decoder.norm]
    handles = [behind[layer].register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class Predictor(nn.Module):
    """Visual tokens [B, K, W] to an embedding [B, D]: attention of one learnt query, then two layers."""

    def __init__(self, width: int, dim: int, *, hidden: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.first = nn.Linear(width, hidden or 2 * width)
        self.second = nn.Linear(hidden or 2 * width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.norm(tokens)
        share = (seen @ self.query).softmax(dim=1)
        return self.second(F.gelu(self.first((share[:, :, None] * seen).sum(dim=1))))


class EmbeddingDistillation(nn.Module):
    """One predictor for each chosen layer, and the learnt scale they share; drawn from `seed`.

    Args:
        width: of the student's hidden states. dim: of the visual teacher's embedding. layers: how many.
        contrastive: weight of InfoNCE.
    """

    def __init__(self, width: int, dim: int, layers: int, *, contrastive: float = CONTRASTIVE, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed, "auxiliary"):
            self.predictors = nn.ModuleList(Predictor(width, dim) for _ in range(layers))
        self.scale = nn.Parameter(torch.tensor(_FIRST_SCALE))
        self.contrastive, self.dim = contrastive, dim

    def forward(self, *, student: Sequence[Tensor], teacher: Tensor) -> dict[str, Tensor]:
        """Named scalars, sums over the layers; the loss is their sum: "smooth_l1" and, weighted, "contrastive".

        Args:
            student: visual tokens [B, K, W] of each layer. teacher: embeddings [B, D] of the same pictures, detached
                here; unit vectors are fine.

        Raises:
            UsageError: another number of layers or pictures, or embeddings of another width.
        """
        if len(student) != len(self.predictors) or teacher.ndim != 2 or teacher.shape[1] != self.dim:
            raise UsageError(
                f"{len(student)} layers and embeddings {list(teacher.shape)} were given to an objective of "
                f"{len(self.predictors)} layers and width {self.dim}; make it for this student and this teacher"
            )
        if any(len(tokens) != len(teacher) for tokens in student):
            raise UsageError(
                f"visual tokens of {len(student[0])} pictures were to predict embeddings of {len(teacher)}; they would "
                "be of other pictures, so give both of one batch"
            )
        target = teacher.detach()
        smooth = contrastive = target.new_zeros(())
        for predict, tokens in zip(self.predictors, student):
            made = predict(tokens)
            wide = torch.promote_types(made.dtype, torch.float32)
            smooth = smooth + F.smooth_l1_loss(made.to(wide), target.to(wide))
            contrastive = contrastive + info_nce(made.to(wide), target.to(wide), self.scale.to(wide))
        return {"smooth_l1": smooth, "contrastive": self.contrastive * contrastive}


def info_nce(made: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Mean over rows of -log of the share of the right target in softmax(min(exp(scale), 100) cos(e_i, t_j)); nats.

    Equal targets of a batch are right together: their shares are summed. made, target: [B, D].
    """
    logits = scale.exp().clamp(max=_LARGEST_SCALE) * F.normalize(made, dim=1) @ F.normalize(target, dim=1).T
    same = (target[:, None] == target[None]).all(dim=2)
    right = logits.masked_fill(~same, -torch.inf).logsumexp(dim=1)
    return (logits.logsumexp(dim=1) - right).mean()
