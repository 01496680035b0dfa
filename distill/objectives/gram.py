"""Similarity-preserving losses: the Gram matrix of a batch follows the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pocketvlm.distill.objectives.blocks import Similarity, summed_rows
from pocketvlm.distill.objectives.common import Widths, choice, kl_rows, positive, unit
from pocketvlm.distill.objectives.within import WithinModality, cosines, without_own


def spkd(student: Tensor, teacher: Tensor) -> Tensor:
    """|n(F_T F_T^T) - n(F_S F_S^T)|_F^2 / N^2 with each *row* of a Gram matrix scaled to length 1 by n."""
    theirs = Similarity(teacher, teacher, 1.0)
    squares = summed_rows(
        lambda block, rows: (unit(theirs.whole(rows)) - unit(block)).square().sum(), Similarity(student, student, 1.0)
    )
    return squares / len(student) ** 2


def cosine_gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all N^2 entries of the squared difference of cosine matrices."""
    own, theirs = cosines(student), cosines(teacher)
    return summed_rows(lambda block, rows: (block - theirs.whole(rows)).square().sum(), own) / len(student) ** 2


def softmax_gram(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """mean_i KL( softmax_{j != i}(cos^T_ij / tau) || softmax_{j != i}(cos^S_ij / tau) )."""
    theirs = cosines(teacher)

    def divergence(block: Tensor, rows: slice) -> Tensor:
        target = without_own(theirs.whole(rows), rows)
        return len(block) * kl_rows(target / temperature, without_own(block, rows) / temperature)

    return summed_rows(divergence, cosines(student)) / len(student)


class Gram(WithinModality):
    """gram: rows that the teacher finds alike are alike for the student.

    Formula: by `variant`, i and j over the B rows (of texts: the captioned ones),
    "cosine" (default, ours): L = mean_ij ( cos^S_ij - cos^T_ij )^2, diagonal included (it is 0).
    "spkd": L = |n(G^T) - n(G^S)|_F^2 / B^2, G = F F^T of the outputs as they come (not normalised: normalising F
        changes this loss), n scales each row of G to length 1. Row scales cancel, other rows' norms do not.
    "softmax" (ours): L = mean_i KL( softmax_{j!=i}(cos^T_ij / tau) || softmax_{j!=i}(cos^S_ij / tau) ), tau =
        `temperature` (default 0.1): the distribution over the other rows. KL direction: teacher || student, no factor
        tau^2. The others have no temperature.
    Inputs: image and/or text ([B, D], widths may differ), chosen by `of` (default "image"). Output: {"gram_image"} (and
    "gram_text"). At least 2 rows, for "softmax" 3: a single other row has probability 1 in both models.
    Reduction: mean over all B^2 entries ("softmax": sum over the other rows, mean over rows).
    Paper: Tung and Mori 2019 (SPKD, 1907.09682), equations 2 to 4, for "spkd"; the usual weight there is in thousands.
    Related: `correlation-congruence` compares a kernel of the cosines, `rkd` distances up to a common scale, `order`
    the teacher's ranking alone; `token-gram` is about places of one picture, `crd` about pictures and captions.
    Cost: one B x B matrix for each model.
    """

    name = "gram"
    formula = "similarity matrices: `cosine` (ours), `spkd`, `softmax` (ours)"
    paper = "SPKD, 1907.09682"

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        of: Sequence[str] | str = "image",
        variant: str = "cosine",
        temperature: float = 0.1,
    ) -> None:
        super().__init__(of)
        self.variant = choice("variant", variant, ("cosine", "spkd", "softmax"))
        self.temperature = positive("temperature", temperature) or 1.0
        if variant == "softmax":
            self.minimum_rows = 3

    def suffixes(self) -> tuple[str, ...]:
        return ("",)

    def relation(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        if self.variant == "softmax":
            return {"": softmax_gram(student, teacher, self.temperature)}
        return {"": (spkd if self.variant == "spkd" else cosine_gram)(student, teacher)}
