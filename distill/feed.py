"""From the choices of a step to tensors, and from tensors through both models to what objectives read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketvlm.distill.batches import Order, Plan
from pocketvlm.distill.dropout import row_keys, rows_keyed
from pocketvlm.distill.fusion import PieceMasking, asked_pieces, masked_words
from pocketvlm.distill.gather import Pair
from pocketvlm.distill.lower import lower_outputs
from pocketvlm.distill.masking import asked_masking, statistics_kept
from pocketvlm.distill.objectives import Outputs
from pocketvlm.distill.objectives.masked_language import MaskedLanguage
from pocketvlm.distill.prepare import Prepared
from pocketvlm.distill.ranks import ALONE, Ranks
from pocketvlm.distill.regions import FINER, Cells, asked_regions, dense_map, map_taps, pooled, said_of
from pocketvlm.distill.shares import share_of
from pocketvlm.distill.step import Step
from pocketvlm.distill.taps import Taps, asked_taps, encode_image, text_length, text_taps
from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import counted
from pocketvlm.students import Student, TowerOutput, fit_projection
from pocketvlm.students.student import TOKENS
from pocketvlm.teachers.ensemble import JoinedCache


@dataclass(frozen=True)
class Beside:
    """What objectives want run beside the student's towers. fusion: the objective with the module that shows pictures
    to masked captions. original: the image tower as it was before training."""

    fusion: MaskedLanguage | None = None
    original: Any = None


class Feed:
    """Makes steps, of which each rank has its own rows, and runs the student over them.

    uniform: whether every part of a batch has the same outputs, also one without a caption: as several ranks need it,
    or several parts of one rank. keyed: whether the student drops parts of its rows, which then have keys.
    """

    def __init__(self, prepared: Prepared, order: Order, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.prepared, self.order, self.device, self.ranks = prepared, order, device, ranks
        self.uniform = ranks.count > 1 or prepared.recipe.train.micro_batch is not None
        self.pretrain, self.keyed = prepared.recipe.train.text_pretrain_steps, False
        if "ids" not in prepared.memo:
            texts = dict.fromkeys([*prepared.texts, *(c.text for s in prepared.samples for c in s.captions)])
            prepared.memo["ids"] = dict(zip(texts, prepared.tokenizer.encode(list(texts)))) if texts else {}
        self._ids: dict[str, np.ndarray[Any, Any]] = prepared.memo["ids"]
        ensemble = prepared.teacher
        self.joint = share_of(ensemble, prepared.images, prepared.words) if ensemble is not None else None
        self.bank, self.classes = self._fixed_bank(), self._teacher_classes()
        self.taps, self.masking = asked_taps(prepared.recipe), asked_masking(prepared.recipe)
        ratio = asked_pieces(prepared.recipe)
        self.pieces = None if ratio is None else PieceMasking(ratio, prepared.student)
        self.cut = prepared.recipe.train.cut_after_block
        self.regions = asked_regions(prepared.recipe)
        self.lower = lower_outputs(prepared, device) if self.cut is not None else None

    def _fixed_bank(self) -> Tensor | None:
        """[N, D] teacher embeddings of the same N texts all along (`teacher.logits`, `train.bank: N`), or None."""
        if self.prepared.bank and self.prepared.images is not None:
            return self.prepared.images.text(self.prepared.bank).to(self.device)
        count, words = self.prepared.recipe.train.bank, self.prepared.words
        if not isinstance(count, int) or words is None:
            return None
        order = np.random.Generator(np.random.PCG64(self.prepared.recipe.train.seed)).permutation(
            len(self.prepared.texts)
        )
        return words.text([self.prepared.english[i] for i in order[:count]]).to(self.device)

    def _teacher_classes(self) -> Tensor | None:
        """[K, D] unit vectors by which the teacher classifies zero-shot: of each class, the mean over its prompts.

        What is classified by them are the targets of the views (`targets`), as in every other objective.
        """
        task, cache, joint = self.prepared.task, self.prepared.images, self.joint
        if task is None or cache is None or joint is None:
            return None
        each = [joint.embedding(cache.text(prompts)) for prompts in task.prompts]
        rows = torch.stack([nn.functional.normalize(rows, dim=-1).mean(dim=0) for rows in each])
        return nn.functional.normalize(rows, dim=-1).to(self.device)

    def class_logits(self, student: Student, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the two heads of a task student say to the plain view of these samples, [N, K] each, on the CPU."""
        assert student.heads is not None, "only a recipe with a task comes here"
        training, found = student.training, []
        student.eval()
        with torch.no_grad():
            for start in range(0, len(rows), 64):
                part = rows[start : start + 64]
                features = self._image(student, self._below(part, [0] * len(part))).features
                found.append(torch.stack(student.heads(features)).float().cpu())
        student.train(training)
        label, taught = torch.cat(found, dim=1)
        return label, taught

    def make(self, step: int) -> Step:
        """This rank's tensors of a 0-based step of the whole run; a pure function of the step."""
        if step < self.pretrain:
            words = self.order.words(step, "pretrain")
            words = words[self.ranks.part(len(words))]
            batch = Step("texts", len(words))
            self._add_texts(batch, words, [])
            self._add_keys(batch, step, words)
            return batch
        plan = self.order.plan(step - self.pretrain)
        plan = plan.part(self.ranks.part(len(plan.rows)), self.ranks.part(len(plan.words)))
        batch = Step("pairs", len(plan.rows))
        batch.pixels = self._below(plan.rows, plan.views)
        pictures, uids = self.prepared.pictures, [self.prepared.samples[row].uid for row in plan.rows]
        seed = self.prepared.recipe.train.seed
        if self.masking is not None:
            # under a cut, `pixels` are what lies below it
            whole = batch.pixels.numpy() if self.cut is None else pictures.batch(plan.rows, plan.views)
            batch.masked = torch.from_numpy(self.masking.paint(whole, seed, step, uids, pictures.spec))
        if self.regions is not None:
            large = [pictures.view(row, view, FINER) for row, view in zip(plan.rows, plan.views)]
            batch.cells = self.regions.batch(large, seed, step, uids, pictures.spec.size)
        batch.group = torch.from_numpy(plan.group)
        if self.prepared.task is not None:
            batch.label = torch.tensor([self.prepared.task.train[row] for row in plan.rows])
        batch.with_text = torch.tensor(
            [i for i, text in enumerate(plan.captions) if text is not None], dtype=torch.long
        )
        captions = [text for text in plan.captions if text is not None]
        self._add_texts(batch, plan.words, captions)
        if self.pieces is not None and batch.ids is not None:
            own = [uids[i] for i in batch.with_text.tolist()]
            batch.hidden = self.pieces.places(batch.ids[: len(captions)].numpy(), seed, step, own)
        self._add_teacher(batch, plan, captions)
        self._add_keys(batch, step, plan.words, uids, plan.views, plan.captions)
        return batch

    def _add_keys(self, batch: Step, step: int, words: list[int], *pairs: Any) -> None:
        if self.keyed:
            texts, seed = [self.prepared.texts[i] for i in words], self.prepared.recipe.train.seed
            batch.image_keys, batch.text_keys = row_keys(seed, step, texts, *pairs)

    def data(self) -> str:
        """What is trained on, for people."""
        pictures = self.prepared.samples
        captioned = sum(bool(sample.captions) for sample in pictures)
        return f"{counted(len(pictures), 'picture')} ({captioned:,} with captions)"

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Where the data stands after `step` steps, where the step number alone does not say it; see `StreamFeed`."""
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on at such a state."""

    def close(self) -> None:
        """End what makes steps in the background."""

    def _add_texts(self, batch: Step, words: list[int], captions: list[str]) -> None:
        texts = [self.prepared.texts[i] for i in words]
        batch.texts = len(texts)
        if captions or texts:
            batch.ids = self._stacked([*captions, *texts])
        cache = self.prepared.words
        if texts and cache is not None:
            english = [self.prepared.english[i] for i in words]
            batch.teacher_texts = cache.text(english)
            if cache.info.text_feature_dim:
                batch.teacher_text_features = cache.text_features(english)

    def _stacked(self, texts: Sequence[str]) -> Tensor:
        """int32 [N, L], cut to the longest of these texts: most are a fifth of the context, and padding costs alike."""
        ids = torch.from_numpy(np.stack([self._ids[text] for text in texts]))
        return ids[:, : text_length(ids, self.prepared.student.text_spec.pad_id)]

    def _add_teacher(self, batch: Step, plan: Plan, captions: list[str]) -> None:
        cache = self.prepared.images
        if cache is None:
            return
        uids = [self.prepared.samples[row].uid for row in plan.rows]
        batch.teacher_image = self.targets(plan.rows, plan.views, plan.captions)
        if cache.info.feature_dim:
            batch.teacher_features = cache.features(uids, plan.views)
        if self.taps.teacher:
            batch.teacher_tokens = cache.tokens(uids, plan.views)
        if self.prepared.bank:
            assert not isinstance(cache, JoinedCache), "the recipe was seen to have one teacher"
            batch.teacher_logits, batch.teacher_ids = cache.logits(uids, plan.views)
        if captions or self.uniform:
            english = self.prepared.read(captions)
            batch.teacher_captions = cache.text(english)
            if cache.info.text_feature_dim:
                batch.teacher_caption_features = cache.text_features(english)

    def targets(self, rows: Sequence[int], views: Sequence[int], captions: Sequence[str | None]) -> Tensor:
        """[B, D] unit vectors that the teacher wants for these views (`TeacherSection`: smooth, caption_mix).

        Of several teachers side by side, each part of length 1.
        """
        cache, section = self.prepared.images, self.prepared.recipe.teacher
        assert cache is not None, "only a run with a teacher asks for targets"
        assert section is not None, "only a run with a teacher asks for targets"
        uids = [self.prepared.samples[row].uid for row in rows]
        target = cache.image(uids, list(views))
        if section.smooth:
            count = self.prepared.recipe.views.count
            mean = torch.stack([cache.image(uids, view) for view in range(count)]).mean(dim=0)
            target = self._units((1 - section.smooth) * target + section.smooth * mean)
        if section.caption_mix and any(text is not None for text in captions):
            places = [place for place, text in enumerate(captions) if text is not None]
            named = section.caption_mix * cache.text(self.prepared.read([c for c in captions if c is not None]))
            target[places] = self._units(target[places] + named)
        return target

    def _units(self, x: Tensor) -> Tensor:
        """Every teacher's part scaled to length 1."""
        assert self.joint is not None, "only a run with a teacher asks for targets"
        return torch.cat([nn.functional.normalize(part, dim=-1) for part in x.split(self.joint.dims, dim=1)], dim=1)

    def fit_projection(self, student: Student) -> None:
        """Start the image projection at its ridge solution (`student.fit_projection`); see `students.ridge`.

        Towards the teacher's targets of every picture; with `fit_to: captions`, and without a teacher, towards the
        student's own text embeddings of the captions there are, so that arms of a comparison start by the same means.
        """
        section, samples = self.prepared.recipe.student, self.prepared.samples
        assert section.fit_projection is not None, "only a recipe that asks for it comes here"
        taught = self.prepared.images is not None and section.fit_to == "teacher"
        rows = [i for i, sample in enumerate(samples) if taught or sample.captions]
        captions = [samples[i].captions[0].text if samples[i].captions else None for i in rows]
        features, targets = [], []
        student.eval()
        with torch.no_grad():
            own = None if taught else self._own_texts(student, [c for c in captions if c])
            for view in range(section.fit_views):
                for start in range(0, len(rows), 64):
                    part = rows[start : start + 64]
                    features.append(self._image(student, self._below(part, [view] * len(part))).features.cpu())
                targets.append(self._joint_targets(rows, view, captions) if own is None else own)
        widths = student.image_tower.widths
        _fit(student.image_tower.projection, features, targets, section.fit_projection, widths)

    def _joint_targets(self, rows: Sequence[int], view: int, captions: Sequence[str | None]) -> Tensor:
        assert self.joint is not None, "only a run with a teacher asks for targets"
        return self.joint.embedding(self.targets(rows, [view] * len(rows), captions))

    def _own_texts(self, student: Student, texts: Sequence[str]) -> Tensor:
        """[N, D] unit vectors of the student's own text tower."""
        ids = self._stacked(texts)
        outputs = [student.encode_text(part.to(self.device)).embedding.cpu() for part in ids.split(256)]
        return nn.functional.normalize(torch.cat(outputs), dim=-1)

    def fit_text_projection(self, student: Student) -> None:
        """The same for the text projection, over the whole text pool (`student.fit_text_projection`)."""
        strength, words, texts = (
            self.prepared.recipe.student.fit_text_projection,
            self.prepared.words,
            self.prepared.texts,
        )
        assert strength is not None, "only a recipe that asks for it comes here"
        assert words is not None, "the recipe was checked to have the teacher's answers to the texts"
        features = []
        student.eval()
        with torch.no_grad():
            for start in range(0, len(texts), 256):
                ids = self._stacked(texts[start : start + 256])
                features.append(student.encode_text(ids.to(self.device)).features.cpu())
        assert self.joint is not None, "whoever answered is a teacher"
        targets = self.joint.embedding(words.text(self.prepared.english))
        _fit(student.text_tower.projection, features, [targets], strength, ())

    def _below(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """What the trained part of the image tower takes: pixels, or the outputs of the part below the cut."""
        if self.lower is not None:
            return self.lower[list(rows), list(views)].float()
        return torch.from_numpy(self.prepared.pictures.batch(rows, views))

    def _image(self, student: Student, x: Tensor) -> TowerOutput:
        return encode_image(student, x.to(self.device), self.cut)

    def _masked(self, student: Student, pixels: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, D] embeddings of masked pictures, which leave no trace in the running statistics."""
        x, tower = pixels.to(self.device), student.image_tower
        with statistics_kept(tower), rows_keyed(keys, "masked"):
            if self.cut is not None:
                with torch.no_grad():
                    x = tower.until_block(x, self.cut)
            return encode_image(student, x, self.cut).embedding.float()

    def _add_masked_words(self, student: Student, batch: Step, outputs: Outputs, fusion: MaskedLanguage) -> None:
        """The guesses at masked pieces in the captions' rows, and zeros and -1 elsewhere."""
        assert batch.with_text is not None, "a batch of pictures says which have captions"
        assert self.pieces is not None, "the recipe was seen to have the objective"
        size, slots, rows = batch.size, self.pieces.slots, batch.with_text.to(self.device)
        tower = student.text_tower
        words = torch.zeros(size, slots, tower.position.shape[1], device=self.device)
        pieces = torch.full((size, slots), -1, dtype=torch.int64, device=self.device)
        if batch.ids is not None and batch.hidden is not None and len(rows):
            ids, places = batch.ids[: len(rows)].to(self.device), batch.hidden.to(self.device)
            keys = None if batch.text_keys is None else batch.text_keys[: len(rows)].to(self.device)
            with rows_keyed(keys, "masked"):
                found, those = masked_words(student, fusion, ids, places, outputs.image[rows])
            words, pieces = words.index_copy(0, rows, found), pieces.index_copy(0, rows, those)
        outputs.masked_words, outputs.masked_pieces, outputs.token_table = words, pieces, tower.token.weight

    def _add_regions(self, outputs: Outputs, cells: Cells, chart: Tensor, original: Any) -> None:
        """The map over the cells, and what the frozen original says of each cell cut out."""
        said = said_of(original, cells.crops.to(self.device))
        mask = cells.mask.to(self.device)
        outputs.regions, outputs.region_mask = pooled(chart, cells), mask
        outputs.region_targets = said.new_zeros(*mask.shape, said.shape[1]).index_put(tuple(mask.nonzero().T), said)

    def forward(
        self, student: Student, batch: Step, beside: Beside | None = None, *, tapped: bool = True
    ) -> dict[str, Pair]:
        """{"pairs": (student, teacher), "texts": (student, teacher)}, whichever the step has; float32.

        beside: what runs beside the student's own towers; without it, nothing does. tapped: record the inner
        activations that objectives read.
        """
        found: dict[str, Pair] = {}
        asked = self.taps if tapped else Taps((), (), ())
        text, text_features, taps = None, None, {}
        ids = batch.ids
        seen, read = (None if k is None else k.to(self.device) for k in (batch.image_keys, batch.text_keys))
        if ids is None and self.uniform:
            # a part without any text: one of padding alone, of which nothing is kept, gives the outputs their widths
            ids = torch.full((1, 1), student.text_spec.pad_id, dtype=torch.int32)
            read = None if read is None else read.new_zeros(1)
        if ids is not None:
            with rows_keyed(read):
                output = student.encode_text(ids.to(self.device), taps=asked.text)
            text, text_features = output.embedding.float(), output.features.float()
            taps = text_taps(output.taps, student.text_spec.context_length)
        captioned = 0 if batch.with_text is None else len(batch.with_text)
        scale, bias = student.logit_scale.float(), torch.zeros((), device=self.device)
        if batch.texts:
            assert text is not None
            assert text_features is not None
            found["texts"] = (
                Outputs(
                    image=text[captioned:], image_features=text_features[captioned:], logit_scale=scale, logit_bias=bias
                ),
                self._teacher(image=batch.teacher_texts, image_features=batch.teacher_text_features),
            )
        if batch.pixels is not None:
            x, beside = batch.pixels.to(self.device), beside or Beside()
            more = map_taps(student, self.cut) if beside.original is not None else ()
            with rows_keyed(seen):
                pictures = encode_image(student, x, self.cut, tuple(dict.fromkeys((*asked.image, *more))))
            image, features = pictures.embedding.float(), pictures.features.float()
            found["pairs"] = self._pairs(batch, image, features, text, text_features, captioned, scale, bias)
            outputs, teacher = found["pairs"]
            own = {name: pictures.taps[name] for name in asked.image}
            outputs.taps = own | self._caption_taps(taps, batch, captioned)
            if asked.text:
                outputs.text_mask = self._caption_mask(batch, captioned, student.text_spec)
            if student.heads is not None and batch.label is not None:
                own, taught = student.heads(pictures.features)
                outputs.class_logits, outputs.taught_logits = own.float(), taught.float()
                outputs.label = batch.label.to(self.device)
            if teacher is not None and self.classes is not None and self.joint is not None:
                cosine = nn.functional.normalize(self.joint.embedding(teacher.image), dim=-1) @ self.classes.T
                teacher.class_logits = teacher.logit_scale * cosine
            if batch.masked is not None:
                outputs.masked_image = self._masked(student, batch.masked, seen)
            if beside.fusion is not None:
                self._add_masked_words(student, batch, outputs, beside.fusion)
            if beside.original is not None and batch.cells is not None:
                with rows_keyed(seen, "places"):
                    chart = dense_map(student, x, pictures.taps, self.cut)
                self._add_regions(outputs, batch.cells, chart, beside.original)
            if teacher is not None and batch.teacher_tokens is not None:
                teacher.taps = {TOKENS: batch.teacher_tokens.to(self.device)}
            if teacher is not None and batch.teacher_logits is not None and batch.teacher_ids is not None:
                teacher.top_logits = batch.teacher_logits.to(self.device)
                teacher.top_ids = batch.teacher_ids.to(self.device)
        return found

    def _caption_taps(self, taps: dict[str, Tensor], batch: Step, captioned: int) -> dict[str, Tensor]:
        """The captions' taps in the captions' rows, zeros elsewhere."""
        assert batch.with_text is not None, "a batch of pictures says which have captions"
        rows, found = batch.with_text.to(self.device), {}
        for name, value in taps.items():
            empty = torch.zeros(batch.size, *value.shape[1:], device=self.device, dtype=value.dtype)
            found[name] = empty.index_copy(0, rows, value[:captioned])
        return found

    def _caption_mask(self, batch: Step, captioned: int, spec: TextSpec) -> Tensor:
        """bool [B, context_length]: the tokens of each row's caption that are no padding."""
        mask = torch.zeros(batch.size, spec.context_length, dtype=torch.bool)
        if batch.ids is not None and batch.with_text is not None and captioned:
            mask[batch.with_text, : batch.ids.shape[1]] = batch.ids[:captioned] != spec.pad_id
        return mask.to(self.device)

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
        if self.bank is not None and self.joint is not None:
            bank, teacher_bank = self.joint.embedding(self.bank), self.bank
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
        joint = self.joint
        if image is None or joint is None:
            return None
        moved: dict[str, Any] = {k: None if v is None else v.to(self.device) for k, v in parts.items()}
        return Outputs(
            image=image.to(self.device),
            logit_scale=torch.tensor(joint.scale, device=self.device),
            logit_bias=torch.tensor(joint.bias, device=self.device),
            **moved,
        )


def _fit(head: Any, features: list[Tensor], targets: list[Tensor], strength: float, widths: Sequence[int]) -> None:
    device = next(head.parameters()).device
    fit_projection(head.cpu(), torch.cat(features), torch.cat(targets), ridge=strength, widths=widths)
    head.to(device)
