"""What one step of a run is made of, before the student has seen it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pocketvlm.distill.regions import Cells


@dataclass
class Step:
    """One step on the CPU, made in the background.

    phase: "pairs", or "texts" while the text tower is trained alone. size: pictures (texts in the text phase).
    pixels: uint8 [B, S, S, 3], or, under `train.cut_after_block`, float32 [B, C, H, W] from below the cut.
    ids: int32 [C + T, L], captions of the C rows in `with_text`, then T texts.
    The teacher's embeddings, features, tokens [B, N, W] and top logits with their ids for the same rows, or None.
    masked: uint8 [B, S, S, 3], the same pictures with patches masked, where an objective asks for them.
    cells: of the pictures, where an objective asks for them.
    hidden: int64 [C, K], the places of each caption whose pieces are masked, -1 for none, where an objective asks.
    label: int64 [B] of a task, -1 where the student has no label.
    image_keys, text_keys: int64 of each row of pixels and of ids, where the student drops parts (`distill.dropout`).
    """

    phase: str
    size: int
    pixels: Tensor | None = None
    with_text: Tensor | None = None
    group: Tensor | None = None
    ids: Tensor | None = None
    texts: int = 0
    teacher_image: Tensor | None = None
    teacher_features: Tensor | None = None
    teacher_captions: Tensor | None = None
    teacher_caption_features: Tensor | None = None
    teacher_texts: Tensor | None = None
    teacher_text_features: Tensor | None = None
    teacher_tokens: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_ids: Tensor | None = None
    masked: Tensor | None = None
    hidden: Tensor | None = None
    cells: Cells | None = None
    label: Tensor | None = None
    image_keys: Tensor | None = None
    text_keys: Tensor | None = None

    def pictures_and_captions(self) -> Step:
        """The same step without its texts, masked pictures and teacher: what a model needs to embed its pairs."""
        captioned = 0 if self.with_text is None else len(self.with_text)
        ids = self.ids[:captioned] if self.ids is not None and captioned else None
        return Step(self.phase, self.size, self.pixels, self.with_text, self.group, ids)
