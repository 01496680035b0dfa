"""From the choices of a step to tensors, and from tensors through both models to what objectives read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pocketvlm.data import cache_dir
from pocketvlm.distill.batches import Order, Plan
from pocketvlm.distill.masking import asked_masking, statistics_kept
from pocketvlm.distill.objectives import Outputs, Widths, build_objective
from pocketvlm.distill.prepare import Prepared
from pocketvlm.distill.taps import asked_taps, encode_image, gray, tap_widths, text_taps
from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.students import Student, TowerOutput, fit_projection
from pocketvlm.students.student import TOKENS, weights_digest
from pocketvlm.teachers.files import write_atomic

Pair = tuple[Outputs, Outputs | None]


@dataclass
class Step:
    """One step on the CPU, made in the background.

    phase: "pairs", or "texts" while the text tower is trained alone. size: pictures (texts in the text phase).
    pixels: uint8 [B, S, S, 3], or, under `train.cut_after_block`, float32 [B, C, H, W] from below the cut.
    ids: int32 [C + T, L], captions of the C rows in `with_text`, then T texts.
    The teacher's embeddings, features and tokens [B, N, W] for the same rows, or None.
    masked: uint8 [B, S, S, 3], the same pictures with patches masked, where an objective asks for them.
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
    masked: Tensor | None = None


class Feed:
    """Makes steps, and runs the student over them."""

    def __init__(self, prepared: Prepared, order: Order, device: torch.device) -> None:
        self.prepared, self.order, self.device = prepared, order, device
        self.pretrain = prepared.recipe.train.text_pretrain_steps
        if "ids" not in prepared.memo:
            texts = dict.fromkeys([*prepared.texts, *(c.text for s in prepared.samples for c in s.captions)])
            prepared.memo["ids"] = dict(zip(texts, prepared.tokenizer.encode(list(texts)))) if texts else {}
        self._ids: dict[str, np.ndarray[Any, Any]] = prepared.memo["ids"]
        self.bank = self._fixed_bank()
        self.taps, self.masking = asked_taps(prepared.recipe), asked_masking(prepared.recipe)
        self.cut = prepared.recipe.train.cut_after_block
        self.lower = lower_outputs(prepared, device) if self.cut is not None else None

    def _fixed_bank(self) -> Tensor | None:
        """[N, D] teacher embeddings of the same N texts all along (`train.bank: N`), or None."""
        count, words = self.prepared.recipe.train.bank, self.prepared.words
        if not isinstance(count, int) or words is None:
            return None
        order = np.random.Generator(np.random.PCG64(self.prepared.recipe.train.seed)).permutation(
            len(self.prepared.texts)
        )
        return words.text([self.prepared.english[i] for i in order[:count]]).to(self.device)

    def make(self, step: int) -> Step:
        """The tensors of a 0-based step of the whole run; a pure function of the step."""
        if step < self.pretrain:
            words = self.order.words(step, "pretrain")
            batch = Step("texts", len(words))
            self._add_texts(batch, words, [])
            return batch
        plan = self.order.plan(step - self.pretrain)
        batch = Step("pairs", len(plan.rows))
        batch.pixels = self._below(plan.rows, plan.views)
        if self.masking is not None:
            pictures, uids = self.prepared.pictures, [self.prepared.samples[row].uid for row in plan.rows]
            # under a cut, `pixels` are what lies below it
            whole = batch.pixels.numpy() if self.cut is None else pictures.batch(plan.rows, plan.views)
            seed = self.prepared.recipe.train.seed
            batch.masked = torch.from_numpy(self.masking.paint(whole, seed, step, uids, pictures.spec))
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
            batch.ids = self._stacked([*captions, *texts])
        cache = self.prepared.words
        if texts and cache is not None:
            english = [self.prepared.english[i] for i in words]
            batch.teacher_texts = finite(cache.text(english), english)
            if cache.info.text_feature_dim:
                batch.teacher_text_features = cache.text_features(english)

    def _stacked(self, texts: Sequence[str]) -> Tensor:
        """int32 [N, L], cut to the longest of these texts: most are a fifth of the context, and padding costs alike."""
        ids = np.stack([self._ids[text] for text in texts])
        longest = int((ids != self.prepared.student.text_spec.pad_id).sum(axis=1).max())
        return torch.from_numpy(ids[:, : max(longest, 1)])

    def _add_teacher(self, batch: Step, plan: Plan, captions: list[str]) -> None:
        cache = self.prepared.images
        if cache is None:
            return
        uids = [self.prepared.samples[row].uid for row in plan.rows]
        batch.teacher_image = self.targets(plan.rows, plan.views, plan.captions)
        if cache.info.feature_dim:
            batch.teacher_features = finite(cache.features(uids, plan.views), uids)
        if self.taps.teacher:
            batch.teacher_tokens = finite(cache.tokens(uids, plan.views), uids)
        if captions:
            english = self.prepared.read(captions)
            batch.teacher_captions = finite(cache.text(english), english)
            if cache.info.text_feature_dim:
                batch.teacher_caption_features = cache.text_features(english)

    def targets(self, rows: Sequence[int], views: Sequence[int], captions: Sequence[str | None]) -> Tensor:
        """[B, D] unit vectors that the teacher wants for these views (`TeacherSection`: smooth, caption_mix)."""
        cache, section = self.prepared.images, self.prepared.recipe.teacher
        assert cache is not None, "only a run with a teacher asks for targets"
        assert section is not None, "only a run with a teacher asks for targets"
        uids = [self.prepared.samples[row].uid for row in rows]
        target = finite(cache.image(uids, list(views)), uids)
        if section.smooth:
            count = self.prepared.recipe.views.count
            mean = torch.stack([cache.image(uids, view) for view in range(count)]).mean(dim=0)
            target = nn.functional.normalize((1 - section.smooth) * target + section.smooth * mean, dim=-1)
        if section.caption_mix and any(text is not None for text in captions):
            places = [place for place, text in enumerate(captions) if text is not None]
            named = section.caption_mix * cache.text(self.prepared.read([c for c in captions if c is not None]))
            target[places] = nn.functional.normalize(target[places] + named, dim=-1)
        return target

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
                targets.append(self.targets(rows, [view] * len(rows), captions) if own is None else own)
        widths = student.image_tower.widths
        _fit(student.image_tower.projection, features, targets, section.fit_projection, widths)

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
        _fit(student.text_tower.projection, features, [words.text(self.prepared.english)], strength, ())

    def _below(self, rows: Sequence[int], views: Sequence[int]) -> Tensor:
        """What the trained part of the image tower takes: pixels, or the outputs of the part below the cut."""
        if self.lower is not None:
            return self.lower[list(rows), list(views)].float()
        return torch.from_numpy(self.prepared.pictures.batch(rows, views))

    def _image(self, student: Student, x: Tensor) -> TowerOutput:
        return encode_image(student, x.to(self.device), self.cut)

    def _masked(self, student: Student, pixels: Tensor) -> Tensor:
        """[B, D] embeddings of masked pictures, which leave no trace in the running statistics."""
        x, tower = pixels.to(self.device), student.image_tower
        with statistics_kept(tower):
            if self.cut is not None:
                with torch.no_grad():
                    x = tower.until_block(x, self.cut)
            return encode_image(student, x, self.cut).embedding.float()

    def forward(self, student: Student, batch: Step) -> dict[str, Pair]:
        """{"pairs": (student, teacher), "texts": (student, teacher)}, whichever the step has; float32."""
        found: dict[str, Pair] = {}
        text, text_features, taps = None, None, {}
        if batch.ids is not None:
            output = student.encode_text(batch.ids.to(self.device), taps=self.taps.text)
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
            pictures = encode_image(student, batch.pixels.to(self.device), self.cut, self.taps.image)
            image, features = pictures.embedding.float(), pictures.features.float()
            found["pairs"] = self._pairs(batch, image, features, text, text_features, captioned, scale, bias)
            outputs, teacher = found["pairs"]
            outputs.taps = pictures.taps | self._caption_taps(taps, batch, captioned)
            if self.taps.text:
                outputs.text_mask = self._caption_mask(batch, captioned, student.text_spec)
            if batch.masked is not None:
                outputs.masked_image = self._masked(student, batch.masked)
            if teacher is not None and batch.teacher_tokens is not None:
                teacher.taps = {TOKENS: batch.teacher_tokens.to(self.device)}
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


def finite(rows: Tensor, names: Sequence[str]) -> Tensor:
    """The teacher's outputs [N, ...] for these pictures or texts, every one of them a number.

    Raises:
        IntegrityError: one is not, and is named.
    """
    if not bool(torch.isfinite(rows).all()):
        bad = names[int((~torch.isfinite(rows.flatten(1)).all(dim=1)).nonzero()[0])]
        raise IntegrityError(
            f"the teacher's output for {bad!r} is not finite, and one such target turns every weight of a student into "
            "nothing; drop that row from the embeddings, or delete the teacher's cache and run the teacher in float32"
        )
    return rows


def lower_outputs(prepared: Prepared, device: torch.device) -> Tensor:
    """What the frozen part below `train.cut_after_block` gives for every picture and view, [N, K, C, H, W] float16.

    Kept in the cache folder under a name made from that part's weights, the pictures and the views, so that runs that
    differ in seed, captions or objectives compute it once; and in `prepared.memo`, on a GPU where it has ample room.
    """
    recipe, student, block = prepared.recipe, prepared.student, prepared.recipe.train.cut_after_block
    assert block is not None, "only a recipe with a cut comes here"
    trunk: Any = student.image_tower.trunk
    # before anything runs through it: in training mode a single gray picture would move its batch-norm statistics
    student.eval()
    student.image_tower.until_block(gray(student), block)
    lower = nn.ModuleList([trunk.conv_stem, trunk.bn1, *trunk.blocks[: block + 1]])
    pictures = prepared.pictures
    facts = [weights_digest(lower), str(student.image_spec), str(block), str(recipe.views.seed)]
    facts += [pictures.policy.digest(), str(recipe.views.count), str(recipe.data.source_px), prepared.pictures_digest]
    key = hashlib.sha256("|".join(facts).encode()).hexdigest()
    path = (
        cache_dir()
        / "lower"
        / f"{student.config.name.replace('/', '-').replace(':', '-')}-{block}-{key[:16]}.safetensors"
    )
    if (place := f"{path.name}@{device}") in prepared.memo:
        return prepared.memo[place]
    prepared.memo[place] = result = _resident(_lower_on_disk(prepared, path, block, device), device)
    return result


def _resident(x: Tensor, device: torch.device) -> Tensor:
    """On the GPU where it takes at most an eighth of the free memory, so that no step waits for its transfer."""
    fits = device.type == "cuda" and 8 * x.nbytes <= torch.cuda.mem_get_info(device)[0]
    return x.to(device) if fits else x


def _lower_on_disk(prepared: Prepared, path: Path, block: int, device: torch.device) -> Tensor:
    recipe, student, pictures = prepared.recipe, prepared.student, prepared.pictures
    if path.exists():
        return load_tensors(path.read_bytes())["lower"]
    rows, found = range(len(prepared.samples)), []
    with torch.no_grad(), prepared.report.stage("image tower, lower part", len(rows)) as update:
        for start in range(0, len(rows), 16):
            part = [row for row in rows[start : start + 16] for _ in range(recipe.views.count)]
            views = list(range(recipe.views.count)) * (len(part) // recipe.views.count)
            pixels = torch.from_numpy(pictures.batch(part, views)).to(device)
            out = student.image_tower.until_block(pixels, block).half().cpu()
            found.append(out.reshape(-1, recipe.views.count, *out.shape[1:]))
            update(min(start + 16, len(rows)), "")
    result = torch.cat(found).contiguous()
    write_atomic(path, save_tensors({"lower": result}))
    return result


def _fit(head: Any, features: list[Tensor], targets: list[Tensor], strength: float, widths: Sequence[int]) -> None:
    device = next(head.parameters()).device
    fit_projection(head.cpu(), torch.cat(features), torch.cat(targets), ridge=strength, widths=widths)
    head.to(device)


def build_objectives(prepared: Prepared) -> nn.ModuleList:
    """The recipe's objectives in order, projectors included, seeded by the run's seed and their place."""
    student, (pictures, texts) = prepared.student, _feature_widths(prepared)
    facts, images, words = prepared.teacher, prepared.images, prepared.words
    taps = tap_widths(student, asked_taps(prepared.recipe), prepared.recipe.train.cut_after_block)
    built = []
    for place, spec in enumerate(prepared.recipe.objectives):
        teacher = None
        if spec.batch == "pairs":
            own = Widths(student.embed_dim, pictures, texts, taps)
            if facts is not None and images is not None:
                info = images.info
                kept = {TOKENS: info.token_dim} if info.token_dim else {}
                teacher = Widths(facts.dim, info.feature_dim or None, info.text_feature_dim or None, kept)
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
    student = prepared.student
    training = student.training
    student.eval()
    with torch.no_grad():
        device = student.log_scale.device
        pictures = student.encode_image(gray(student))
        texts = student.encode_text(torch.ones(1, student.text_spec.context_length, dtype=torch.int32, device=device))
    student.train(training)
    return pictures.features.shape[-1], texts.features.shape[-1]
