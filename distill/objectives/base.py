"""The shape of an objective.

An objective sees the whole batch at once, already gathered over ranks with gradient by the loop
(`distill.gather`), and returns named scalar terms. Because of that, it holds no code for ranks, for
gradient accumulation or for chunked (GradCache-style) backward: the loop can compute all embeddings,
take the objective's gradient with respect to them, and run the towers' backward in chunks. Every rank
then has the same global loss, and computes it whole or (`objectives.blocks`) shares its rows out; a
differentiable gather sums the gradients over ranks and data parallelism averages them, which gives
exactly the gradient of the global loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Outputs:
    """One model's outputs for a batch of B images with (possibly missing) captions.

    image: [B, D] raw (not normalised) image embeddings. text: [B, D] raw text embeddings or None;
    rows without a caption hold a valid tensor that must be ignored through `has_text`.
    has_text: bool [B]. logit_scale: positive scalar multiplier of the cosine. logit_bias: scalar (SigLIP).
    image_features / text_features: [B, W] pooled features before the joint projection, or None.
    taps: named inner activations that an objective asked for: [B, C, H, W], [B, N, W] or [B, W]; those of the text
    tower under "text." and the name, in every row.
    text_mask: bool [B, L], where the text tower's tokens are no padding, or None.
    masked_image: [B, D] raw embeddings of the same pictures with patches masked, or None.
    masked_words: [B, K, W] the text tower's last features at masked pieces of the captions, the whole picture fused in,
    or None; masked_pieces: int64 [B, K], which pieces these were, -1 where there is none.
    regions, region_targets: [B, R, D] the student's map pooled over cells of the picture, and what the frozen student
    before training says of these cells cut out, or None; region_mask: bool [B, R], which of them there are.
    token_table: [V, E] the text tower's token embedding, or None.
    bank: [N, D] embeddings of a fixed list of texts (the same texts for student and teacher), or None.
    top_logits: [B, T + 1] logarithms of the T largest shares of the bank by the teacher's softmax at its own logit
    scale, and of the sum of all others; top_ids: int64 [B, T], which texts of the bank these are; or None.
    group: int64 [B]; equal values mean the same concept (duplicate captions), or None.
    class_logits: [B, K] over the recipe's classes, of the teacher's zero-shot classifier, or of the student's head that
    learns from labels; None without classes. taught_logits: [B, K] of the student's head that learns from the teacher.
    label: int64 [B], index of the row's class, -1 where it is not known to the student; or None.
    """

    image: Tensor
    text: Tensor | None = None
    has_text: Tensor | None = None
    logit_scale: Tensor = field(default_factory=lambda: torch.tensor(1.0))
    logit_bias: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    bank: Tensor | None = None
    top_logits: Tensor | None = None
    top_ids: Tensor | None = None
    group: Tensor | None = None
    text_mask: Tensor | None = None
    masked_image: Tensor | None = None
    masked_words: Tensor | None = None
    masked_pieces: Tensor | None = None
    token_table: Tensor | None = None
    regions: Tensor | None = None
    region_targets: Tensor | None = None
    region_mask: Tensor | None = None
    class_logits: Tensor | None = None
    taught_logits: Tensor | None = None
    label: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """What an objective must be given; the loop refuses a recipe whose parts cannot provide it.

    captions: rows without a caption are masked out of this objective (it never invents a target).
    teacher: reads teacher outputs. teacher_image: among them `image`, which a teacher of texts alone has not.
    momentum: its `teacher` is the moving average of the student itself, which the loop runs without a gradient over the
    same batch (needs no external teacher).
    features: reads `image_features` of both models. bank: reads embeddings of a fixed text list. taps: which of the
    options `student_tap` (image tower), `text_tap` (text tower) and `teacher_tap` name inner activations that it reads.
    masked_view: wants an extra student forward of a masked image, as its options `ratio` and `cells` say.
    masked_text: wants an extra forward of the text tower over masked captions, with its own fusion module in it.
    regions: wants the student's map over cells of the picture, and the untrained student's view of these, as its option
    `cells` says.
    classes: reads the logits of a fixed list of classes (the recipe's `task`).
    logits: reads the teacher's `top_logits` over the bank (the recipe's `teacher.logits`).
    """

    captions: bool = False
    teacher: bool = True
    features: bool = False
    bank: bool = False
    taps: tuple[str, ...] = ()
    masked_view: bool = False
    masked_text: bool = False
    regions: bool = False
    momentum: bool = False
    teacher_image: bool = True
    classes: bool = False
    logits: bool = False

    @property
    def targets(self) -> bool:
        """Whether `forward` must be given a `teacher`: an external one, or the student's moving average."""
        return self.teacher or self.momentum


class Objective(nn.Module):
    """Base of all objectives. Subclasses set `needs`, own their projectors, and define `forward`.

    forward(*, student, teacher) returns {"term": scalar}; weights are applied by the loop. Every term is a
    mean over the rows that take part, and exactly zero *with* a graph when no row does, so that a batch
    without captions neither crashes nor yields NaN. Teacher tensors never receive a gradient.
    """

    needs: Needs = Needs()

    def at(self, step: int, progress: float) -> None:
        """Told by the loop before every step; does nothing unless the objective changes during training.

        What an objective takes from here is a function of the step alone, never of earlier calls, so that a resumed run
        and every rank have the same and no checkpoint needs to hold it.

        Args:
            step: 0-based step of the whole run.
            progress: 0 in the first step of the main phase (and before it), 1 in its last.
        """

    def forward(self, *, student: Outputs, teacher: Outputs | None = None) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define forward")
