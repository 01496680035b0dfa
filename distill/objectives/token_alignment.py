"""Token-level alignment of the two towers: every word finds its patch, every patch its word."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Projector, Widths, choice, own_scale, positive, unit
from pocketvlm.distill.objectives.common import tap_of as tap
from pocketvlm.distill.objectives.contrastive import DUPLICATES, info_nce
from pocketvlm.edge.errors import UsageError

VARIANTS = ("filip", "words")
# numbers of the similarity of patches and words that exist at a time
_AT_ONCE = 1 << 24
# below every cosine
_ABSENT = -2.0


def best_matches(patches: Tensor, words: Tensor, real: Tensor, *, at_once: int = _AT_ONCE) -> tuple[Tensor, Tensor]:
    """Mean similarity of each picture's patches to their best words, and of each text's words to their best patches.

    patches: unit vectors [P, N, W]. words: unit vectors [Q, L, W]. real: bool [Q, L], at least one in a row.
    Returns (by patches, by words), both [P, Q]. The P N Q L similarities are made `at_once` at a time, a few pictures
    each; kept for the backward are the places of the maxima, P Q (N + L) numbers.
    """
    found: list[tuple[Tensor, Tensor]] = []
    step = max(1, at_once // max(1, patches.shape[1] * words.shape[0] * words.shape[1]))
    count = real.sum(dim=1).clamp(min=1).to(words.dtype)
    for part in patches.split(step):
        similarity = torch.einsum("pnw,qlw->pqnl", part, words).masked_fill(~real[None, :, None, :], _ABSENT)
        # indices and no copy are kept for the backward by max, but not by amax
        by_patches = similarity.max(dim=3).values.mean(dim=2)
        by_words = (similarity.max(dim=2).values.masked_fill(~real[None], 0.0)).sum(dim=2) / count
        found.append((by_patches, by_words))
    return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])


class TokenAlignment(BatchObjective):
    """token-alignment: InfoNCE of scores that are made of the best match of each word and of each patch.

    Formula: with x_in the projected, L2-normalised patches of picture i (n = 1..N), y_jl the words of caption j (l over
    its real tokens, L_j of them), c' = exp(log_scale) its own,
        a_ij = mean_n max_l x_in.y_jl,   b_ij = mean_l max_n x_in.y_jl;
    variant "filip" (default): L = 1/2 [ mean_i CE(softmax_j(c' a_ij), i) + mean_j CE(softmax_i(c' b_ij), j) ];
    variant "words": b in both places: each word takes its best patch, and patches that no word wants count nowhere.
    Inputs: student.taps[`student_tap`] [B, N, W_I] or [B, C, H, W]; student.taps["text." + `text_tap`] [B, L, W_T];
    text_mask [B, L] (padding is False); has_text, group [B]. No teacher. Output: {"token-alignment"}.
    Both are projected (linear, without a common start) to `width` (256) numbers by the objective's own projectors:
    seeded, in the checkpoint, never exported. It shapes the towers below their pooling; at inference the pooled
    embeddings are compared, not tokens.
    Reduction: mean over captioned rows, half for each direction. Temperature: a learnable log scale of its own, from
    `logit_scale` (1/0.07), kept within [1, 100]. `duplicates` as in `clip` (default "ignore").
    Paper: Yao et al. 2021 (FILIP, 2111.07783), section 3.1, as in two re-implementations and notes: max over the other
    side's tokens, mean over the own ones that are no padding; there the tokens are also what is compared at inference.
    "words" is our construction, LightCLIP-style (2312.00674): of that paper only "relaxed bipartite matching of patches
    and words" is known to us. We read "relaxed" as one-to-one no longer being asked of the patches.
    Ours: taps of convolutional towers as patches; no patch is dropped; `duplicates`.
    Related: with one patch and one word it is `clip` of the projected tokens, at a scale of its own; `hint` and
    `token-gram` shape the picture's map by a teacher's instead.
    Cost: P^2 N L similarities of `width` numbers, at most 2^24 of them in memory at a time (chunked over pictures), and
    P^2 (N + L) places of maxima kept for the backward.
    """

    name = "token-alignment"
    formula = "InfoNCE of scores made of each token's best match: `filip`, `words`"
    paper = "FILIP, 2111.07783; `words` ours, LightCLIP-style"
    needs = Needs(captions=True, teacher=False, taps=("student_tap", "text_tap"))
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        variant: str = "filip",
        student_tap: str = "tokens",
        text_tap: str = "tokens",
        width: int = 256,
        logit_scale: float = 1 / 0.07,
        duplicates: str = "ignore",
    ) -> None:
        super().__init__()
        self.variant = choice("variant", variant, VARIANTS)
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)
        self.image_tap, self.text_tap = student_tap, f"text.{text_tap}"
        if not isinstance(width, int) or isinstance(width, bool) or width < 2:
            raise UsageError(
                f"objective option 'width' is {width!r} but must be a whole number from 2; unit vectors of one number "
                "are only signs, so give a wider one"
            )
        self.log_scale = nn.Parameter(torch.tensor(math.log(positive("logit_scale", logit_scale) or 1.0)))
        image = student.tap(self.name, "student", self.image_tap)
        text = student.tap(self.name, "student", self.text_tap)
        self.image_projector = Projector(image, width, seed=seed, tag="token-alignment/image")
        self.text_projector = Projector(text, width, seed=seed, tag="token-alignment/text")

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        scale = own_scale(self.log_scale)
        rows = self.pairs(student, None)
        if rows is None:
            return {self.name: self.zero(student)}
        patches, words = (
            tap(self.name, student, "student", self.image_tap),
            tap(self.name, student, "student", self.text_tap),
        )
        if patches.ndim == 4:
            patches = patches.flatten(2).transpose(1, 2)
        real = student.text_mask
        if patches.ndim != 3 or words.ndim != 3 or real is None or real.shape != words.shape[:2]:
            raise UsageError(
                f"objective 'token-alignment' was given patches {list(patches.shape)}, words {list(words.shape)} and a "
                f"text_mask {None if real is None else list(real.shape)} but takes [B, N, W], [B, L, W] and [B, L]; "
                "words could not be told from padding, so tap token sequences and give their mask"
            )
        if rows.keep is not None:
            patches, words, real = patches[rows.keep], words[rows.keep], real[rows.keep]
        by_patches, by_words = best_matches(unit(self.image_projector(patches)), unit(self.text_projector(words)), real)
        first = by_words if self.variant == "words" else by_patches
        both = info_nce(scale * first, rows.group, self.duplicates)
        both = both + info_nce(scale * by_words.T, rows.group, self.duplicates)
        return {self.name: both / 2}
