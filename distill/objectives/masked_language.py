"""Masked language modelling: a train-only module shows the picture to the text tower, which guesses masked pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Projector, Widths, seeded_generator, unit
from pocketvlm.edge.errors import UsageError

# fused features start close to the text tower's own, which may be a trained one
_START = 0.1


def masked_count(ratio: float, pieces: int) -> int:
    """How many of a caption's pieces are masked: ratio pieces, rounded, and at least one of any.

    Raises:
        UsageError: the ratio is no number above 0 and below 1.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise UsageError(
            f"objective 'masked-language' was given ratio {ratio!r}; some pieces must be masked and some read, so give "
            "a share between 0 and 1"
        )
    return min(pieces, max(1, round(ratio * pieces)))


def checked_stages(stages: Sequence[int] | None, blocks: int) -> tuple[int, ...]:
    """The blocks of a text tower of `blocks` after which the picture is fused in; None means every one.

    Raises:
        UsageError: there are none, or they are no increasing block numbers.
    """
    found = tuple(range(blocks)) if stages is None else tuple(stages) if isinstance(stages, Sequence) else (stages,)
    whole = all(isinstance(stage, int) and not isinstance(stage, bool) for stage in found)
    if not found or not whole or list(found) != sorted(set(found)) or not 0 <= found[0] <= found[-1] < blocks:
        raise UsageError(
            f"objective 'masked-language' was given stages {stages!r} of a text tower with {blocks} blocks; the "
            f"picture could not be fused in there, so give increasing block numbers from 0 to {blocks - 1}"
            if blocks
            else "objective 'masked-language' was given a text tower without blocks, which reads no piece beside "
            "another; there is nowhere to fuse the picture in, so use a student with text layers"
        )
    return found


class MaskedLanguage(BatchObjective):
    """masked-language: the text tower, shown the picture by a train-only module, guesses masked pieces of the caption.

    Formula: a share `ratio` of a caption's pieces is masked (at least one; never special ones): their token embeddings
    are replaced by a trained vector. The text tower reads the rest, and after each block k of `stages` every place p
    takes in the picture, with n(x) = x/|x| and v the student's own embedding of the whole, unmasked picture,
        x_p <- x_p + C_k gelu( A_k x_p + B_k n(v) ),   A_k, B_k, C_k with biases, `width` units inside.
    With h the last features of a masked place, E [V, E] the tower's token embedding, LN without parameters,
        L = mean over all masked places of -log softmax( E LN( gelu( W h + b ) ) )[piece].
    Inputs: student.masked_words [B, K, W], masked_pieces int64 [B, K] (-1: none), token_table [V, E], has_text. No
    teacher. Output: {"masked-language": scalar}.
    Reduction: mean over the masked places of the whole batch, so a long caption counts more than a short one. No
    temperature. A batch of one is fine. Gradients reach the text tower, its token embedding by both ways, and the image
    tower through v.
    Which pieces: a function of (seed, step, uid) alone, so that a resumed run masks the same ones.
    Train-only: mask vector, A, B, C, W and b belong to the objective, which a checkpoint keeps and no export has. The
    vocabulary needs no [MASK]. With causal attention a place sees the pieces before it.
    Paper: Nie et al. 2023 (LightCLIP, 2312.00674), whose third loss is this; only its outline could be had: "an
    auxiliary fusion module injects unmasked image embedding into masked text embedding at different network stages".
    our construction: the form of the module (a residual layer, C at a tenth of its usual start), the tied head of BERT
    (Devlin et al. 2019, 1810.04805) without a bias, all masked places replaced (BERT: 80 %), `stages` every block,
    `ratio` 0.15 as in BERT.
    Related: `token-alignment` is our form of the same paper's second loss, `soft-negatives` of its first.
    Cost: another forward and backward of the text tower, and M x V logits for M masked places: no place that is not
    masked sees the vocabulary.
    """

    name = "masked-language"
    formula = (
        "cross-entropy of masked pieces of the caption, which the text tower guesses while a train-only module shows "
        "it the picture"
    )
    paper = "our construction, LightCLIP-style (2312.00674)"
    needs = Needs(captions=True, teacher=False, masked_text=True)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        ratio: float = 0.15,
        stages: Sequence[int] | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        masked_count(ratio, 1)
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise UsageError(
                f"objective 'masked-language' was given width {width!r}; its fusion module would have no units, so "
                "give a whole number from 1"
            )
        if not student.text_features or not student.token_table:
            raise UsageError(
                "objective 'masked-language' was built without the widths of a text tower's features and tokens, "
                "so there would be no pieces to guess; give text_features and token_table of the student"
            )
        words, image = student.text_features, student.embedding
        self.ratio, self.stages = ratio, checked_stages(stages, student.text_blocks)

        def projectors(width_in: int, width_out: int, part: str) -> nn.ModuleList:
            tags = [f"masked-language/{part}/{stage}" for stage in self.stages]
            return nn.ModuleList(Projector(width_in, width_out, seed=seed, tag=tag) for tag in tags)

        self.word_projectors = projectors(words, width, "words")
        self.image_projectors = projectors(image, width, "image")
        self.out_projectors = projectors(width, words, "out")
        with torch.no_grad():
            for projector in self.out_projectors:
                projector.weights[0].mul_(_START)  # type: ignore[union-attr,index]
        self.head_projector = Projector(words, student.token_table, seed=seed, tag="masked-language/head")
        draw = torch.randn(student.token_table, generator=seeded_generator(seed, "masked-language/mask"))
        self.mask = nn.Parameter(0.02 * draw)

    def fuse(self, place: int, words: Tensor, image: Tensor) -> Tensor:
        """What leaves the block `stages[place]`, the picture taken in: words [C, L, W], image [C, D] -> [C, L, W]."""
        inner = self.word_projectors[place](words) + self.image_projectors[place](unit(image))[:, None]
        return words + self.out_projectors[place](F.gelu(inner)).to(words.dtype)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        words, pieces, table = student.masked_words, student.masked_pieces, student.token_table
        if words is None or pieces is None or table is None:
            raise UsageError(
                "objective 'masked-language' was given outputs without masked_words, masked_pieces or token_table; "
                "there is nothing to guess, so run the text tower on masked captions and put these there"
            )
        keep = pieces >= 0
        if student.has_text is not None:
            keep = keep & student.has_text[:, None]
        if student.text is None or not bool(keep.any()):
            return {"masked-language": self.zero(student)}
        guess = F.layer_norm(F.gelu(self.head_projector(words[keep])), table.shape[1:])
        return {"masked-language": F.cross_entropy(guess @ table.T, pieces[keep])}
