"""From the choices of a step to tensors, and from tensors through both models to what objectives read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketvlm.distill.batches import Order, Plan
from pocketvlm.distill.objectives import Outputs, Widths, build_objective
from pocketvlm.distill.prepare import Prepared
from pocketvlm.students import Student

Pair = tuple[Outputs, Outputs | None]


@dataclass
class Step:
    """One step on the CPU, made in the background.

    phase: "pairs", or "texts" while the text tower is trained alone. size: pictures (texts in the text phase).
    pixels: uint8 [B, S, S, 3]. ids: int32 [C + T, L], captions of the C rows in `with_text`, then T texts.
    The teacher's embeddings and features for the same rows, or None.
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


class Feed:
    """Makes steps, and runs the student over them."""

    def __init__(self, prepared: Prepared, order: Order, device: torch.device) -> None:
        self.prepared, self.order, self.device = prepared, order, device
        self.pretrain = prepared.recipe.train.text_pretrain_steps
        self._ids: dict[str, np.ndarray[Any, Any]] = {}
        texts = dict.fromkeys([*prepared.texts, *(c.text for s in prepared.samples for c in s.captions)])
        if texts:
            self._ids = dict(zip(texts, prepared.tokenizer.encode(list(texts))))
        self.bank = self._fixed_bank()

    def _fixed_bank(self) -> Tensor | None:
        """[N, D] teacher embeddings of the same N texts all along (`train.bank: N`), or None."""
        count, words = self.prepared.recipe.train.bank, self.prepared.words
        if not isinstance(count, int) or words is None:
            return None
        order = np.random.Generator(np.random.PCG64(self.prepared.recipe.train.seed)).permutation(
            len(self.prepared.texts)
        )
        return words.text([self.prepared.texts[i] for i in order[:count]]).to(self.device)

    def make(self, step: int) -> Step:
        """The tensors of a 0-based step of the whole run; a pure function of the step."""
        if step < self.pretrain:
            words = self.order.words(step, "pretrain")
            batch = Step("texts", len(words))
            self._add_texts(batch, words, [])
            return batch
        plan = self.order.plan(step - self.pretrain)
        batch = Step("pairs", len(plan.rows))
        batch.pixels = torch.from_numpy(self.prepared.pictures.batch(plan.rows, plan.views))
        batch.group = torch.from_numpy(plan.group)
        batch.with_text = torch.tensor(
            [i for i, text in enumerate(plan.captions) if text is not None], dtype=torch.long
        )
        captions = [text for text in plan.captions if text is not None]
        self._add_texts(batch, plan.words, captions)
        self._add_teacher(batch, plan, captions)
        return batch

    def _add_texts(self, batch: Step, words: list[int], captions: list[str]) -> None:
        texts = [self.prepared.texts[i] for i in words]
        batch.texts = len(texts)
        if captions or texts:
            batch.ids = torch.from_numpy(np.stack([self._ids[text] for text in [*captions, *texts]]))
        cache = self.prepared.words
        if texts and cache is not None:
            batch.teacher_texts = cache.text(texts)
            if cache.info.text_feature_dim:
                batch.teacher_text_features = cache.text_features(texts)

    def _add_teacher(self, batch: Step, plan: Plan, captions: list[str]) -> None:
        cache = self.prepared.images
        if cache is None:
            return
        uids = [self.prepared.samples[row].uid for row in plan.rows]
        batch.teacher_image = cache.image(uids, plan.views)
        if cache.info.feature_dim:
            batch.teacher_features = cache.features(uids, plan.views)
        if captions:
            batch.teacher_captions = cache.text(captions)
            if cache.info.text_feature_dim:
                batch.teacher_caption_features = cache.text_features(captions)

    def forward(self, student: Student, batch: Step) -> dict[str, Pair]:
        """{"pairs": (student, teacher), "texts": (student, teacher)}, whichever the step has; float32."""
        found: dict[str, Pair] = {}
        text, text_features = None, None
        if batch.ids is not None:
            output = student.encode_text(batch.ids.to(self.device))
            text, text_features = output.embedding.float(), output.features.float()
        captioned = 0 if batch.with_text is None else len(batch.with_text)
        scale, bias = student.logit_scale.float(), torch.zeros((), device=self.device)
        if batch.texts:
            assert text is not None and text_features is not None
            found["texts"] = (
                Outputs(
                    image=text[captioned:], image_features=text_features[captioned:], logit_scale=scale, logit_bias=bias
                ),
                self._teacher(image=batch.teacher_texts, image_features=batch.teacher_text_features),
            )
        if batch.pixels is not None:
            pictures = student.encode_image(batch.pixels.to(self.device))
            image, features = pictures.embedding.float(), pictures.features.float()
            found["pairs"] = self._pairs(batch, image, features, text, text_features, captioned, scale, bias)
        return found

    def _pairs(
        self,
        batch: Step,
        image: Tensor,
        features: Tensor,
        text: Tensor | None,
        text_features: Tensor | None,
        captioned: int,
        scale: Tensor,
        bias: Tensor,
    ) -> Pair:
        assert batch.with_text is not None
        rows = batch.with_text.to(self.device)
        has_text = torch.zeros(len(image), dtype=torch.bool, device=self.device)
        has_text[rows] = True

        def spread(value: Tensor | None, width: int) -> Tensor:
            """Captioned rows where they belong, zeros elsewhere (masked by has_text)."""
            empty = torch.zeros(len(image), width, device=self.device)
            return empty if value is None or captioned == 0 else empty.index_copy(0, rows, value[:captioned].to(empty))

        group = None if batch.group is None else batch.group.to(self.device)
        bank = text[captioned:] if text is not None and batch.texts else None
        teacher_bank = batch.teacher_texts
        if self.bank is not None:
            bank = teacher_bank = self.bank
        student = Outputs(
            image=image,
            text=spread(text, image.shape[1]),
            has_text=has_text,
            logit_scale=scale,
            logit_bias=bias,
            image_features=features,
            text_features=None if text_features is None else spread(text_features, text_features.shape[1]),
            bank=bank,
            group=group,
        )
        if batch.teacher_image is None:
            return student, None
        their_features = batch.teacher_caption_features
        teacher = self._teacher(
            image=batch.teacher_image,
            image_features=batch.teacher_features,
            text=spread(batch.teacher_captions, batch.teacher_image.shape[1]),
            text_features=None if their_features is None else spread(their_features, their_features.shape[1]),
            has_text=has_text,
            bank=teacher_bank,
            group=group,
        )
        return student, teacher

    def _teacher(self, *, image: Tensor | None, **parts: Tensor | None) -> Outputs | None:
        facts = self.prepared.teacher
        if image is None or facts is None:
            return None
        moved: dict[str, Any] = {k: None if v is None else v.to(self.device) for k, v in parts.items()}
        return Outputs(
            image=image.to(self.device),
            logit_scale=torch.tensor(facts.logit_scale, device=self.device),
            logit_bias=torch.tensor(facts.logit_bias, device=self.device),
            **moved,
        )


def build_objectives(prepared: Prepared) -> nn.ModuleList:
    """The recipe's objectives in order, projectors included, seeded by the run's seed and their place."""
    student, (pictures, texts) = prepared.student, _feature_widths(prepared)
    facts, images, words = prepared.teacher, prepared.images, prepared.words
    built = []
    for place, spec in enumerate(prepared.recipe.objectives):
        teacher = None
        if spec.batch == "pairs":
            own = Widths(student.embed_dim, pictures, texts)
            if facts is not None and images is not None:
                info = images.info
                teacher = Widths(facts.dim, info.feature_dim or None, info.text_feature_dim or None)
        else:
            # texts take the place of pictures in the text-only batch
            own = Widths(student.embed_dim, texts)
            if facts is not None and words is not None:
                teacher = Widths(facts.dim, words.info.text_feature_dim or None)
        seed = prepared.recipe.train.seed + 1000 * place
        built.append(build_objective(spec.name, student=own, teacher=teacher, seed=seed, **spec.options))
    return nn.ModuleList(built)


def _feature_widths(prepared: Prepared) -> tuple[int, int]:
    """(image, text) widths of the student's pooled features, asked of the student itself."""
    student, size = prepared.student, prepared.student.image_spec.size
    training = student.training
    student.eval()
    with torch.no_grad():
        device = student.log_scale.device
        pictures = student.encode_image(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device))
        texts = student.encode_text(torch.ones(1, student.text_spec.context_length, dtype=torch.int32, device=device))
    student.train(training)
    return pictures.features.shape[-1], texts.features.shape[-1]
