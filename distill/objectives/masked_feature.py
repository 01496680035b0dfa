"""Masked feature distillation: the student sees a part of the picture, the teacher all of it."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, positive, projector_if_needed, unit
from pocketvlm.distill.objectives.feature import DISTANCES, row_distance
from pocketvlm.edge.errors import UsageError


def masked_cells(ratio: float, cells: int) -> int:
    """How many of `cells` x `cells` patches are masked: ratio cells^2, rounded.

    Raises:
        UsageError: the options are no such numbers, or none or all of the patches would be masked.
    """
    whole = isinstance(cells, int) and not isinstance(cells, bool) and cells >= 2
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and 0 < ratio < 1
    count = round(ratio * cells**2) if whole and number else 0
    if not (whole and number and 0 < count < cells**2):
        raise UsageError(
            f"objective 'masked-feature' was given ratio {ratio!r} of cells {cells!r} x {cells!r}; some patches must "
            "be masked and some seen, so give a share between 0 and 1 and a whole number of cells from 2"
        )
    return count


class MaskedFeature(BatchObjective):
    """masked-feature: the embedding of a partly masked picture goes where the teacher's of the whole picture is.

    Formula: with m(x) the picture with `ratio` (0.75) of its `cells` x `cells` (7 x 7) square patches masked, n(x) =
    x/|x| and W the projector (identity for equal widths),
        L = mean_i d( n(W v^S(m(x_i))), n(v^T(x_i)) ),  d: `distance` "l2" (default), "cosine" or "smooth-l1" with
    threshold `beta` (default D^-1/2), all as in `feature`.
    Which patches: a function of (seed, step, uid) alone, so that a resumed run masks the same ones.
    Inputs: student.masked_image [B, D], teacher.image [B, D]; captions are not used. Output: {"masked-feature"}.
    Reduction: sum over D, mean over rows. No temperature. A batch of one is fine.
    Paper: Yang et al. 2024 (CLIP-KD, 2307.12732), MFD, ratio 0.75: there a ViT student does not compute the masked
    patches at all. Ours: masked patches are painted in the student's mean colour (0 after standardisation), so that
    convolutional towers take them too; the picture's term only (for the text add `feature` with image: 0); batch norms
    use the masked batch's statistics and do not keep them, as nothing is masked when the student is used.
    Related: `feature` without the mask. Several objectives share one masked view, so their options must agree.
    Cost: a second forward and backward of the image tower, about twice a step's time of that tower; with
    `train.cut_after_block` the frozen part below the cut is run on the masked picture too, which a cache saves else.
    """

    name = "masked-feature"
    formula = "`feature` of a partly masked picture against the teacher's of the whole one"
    paper = "CLIP-KD (MFD); painted patches ours"
    needs = Needs(masked_view=True)
    coordinates = True

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        ratio: float = 0.75,
        cells: int = 7,
        distance: str = "l2",
        beta: float | None = None,
    ) -> None:
        super().__init__()
        masked_cells(ratio, cells)
        width = (teacher or student).embedding
        self.distance = choice("distance", distance, DISTANCES)
        self.beta = positive("beta", beta) or width**-0.5
        self.projector = projector_if_needed(student.embedding, width, seed=seed, tag="masked-feature")

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        if student.masked_image is None:
            raise UsageError(
                "objective 'masked-feature' was given outputs without masked_image; there is no embedding of a masked "
                "picture to compare, so run the student on one and put it there"
            )
        x, target = unit(self.projector(student.masked_image)), unit(teacher.image)
        rows = row_distance(x, target, self.distance, self.beta)
        return {"masked-feature": rows.mean() if len(rows) else self.zero(student)}
