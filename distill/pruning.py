"""Pruning as a user meets it: open a trained dual encoder, rank its parts on data, write the pruned student."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.data import open_data
from pocketvlm.data.source import DataSource
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.students import Student, load_student, save_student
from pocketvlm.students.convert import student_from_clip
from pocketvlm.students.prune import TOWERS, Pruned, prune
from pocketvlm.teachers.device import full_float32, pick_device
from pocketvlm.teachers.dual import PROBES, DualEncoderTeacher

SCHEMA = "1.0"
SCORE = "mean reciprocal rank, mean of image to text and text to image"
# largest difference of any coordinate of a unit vector; float32 rounding through a deep tower stays below
_SAME = 1e-5


def prune_to(
    spec: str,
    out: str | Path,
    *,
    data: str | DataSource | None = None,
    method: str = "mope",
    keep_heads: float = 1.0,
    keep_mlp: float = 1.0,
    keep_depth: float = 1.0,
    towers: Sequence[str] = TOWERS,
    groups: int = 8,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    allow_download: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Pruned:
    """Prune what `spec` names (`open_student`) and write the student and pruning.json into the folder `out`.

    data: a data spec or source to score on; "mope" needs it, for the others it only reports. The rest as in
    `students.prune.prune`; options of loading as in `teachers.load_teacher`.

    Raises:
        UsageError: as `prune`, `open_student` and `Retrieval`; a folder that is not empty.
    """
    out = Path(out)
    if not overwrite and out.exists() and any(out.iterdir()):
        raise UsageError(f"folder {str(out)!r} is not empty and would be lost; name another one or pass --overwrite")
    target = pick_device(device)
    student = open_student(spec, allow_download=allow_download, trust_remote_code=trust_remote_code).to(target)
    score = None
    name = None
    if data is not None:
        source = open_data(data) if isinstance(data, str) else data
        name = source.name
        score = Retrieval(source, student)
    result = prune(
        student, method=method, keep_heads=keep_heads, keep_mlp=keep_mlp, keep_depth=keep_depth, towers=towers,
        score=score, groups=groups, seed=seed, progress=progress,
    )  # fmt: skip
    save_student(result.student.cpu(), out, overwrite=overwrite)
    asked = {"heads": keep_heads, "mlp": keep_mlp, "depth": keep_depth, "groups": groups, "seed": seed}
    described = {
        "schema": SCHEMA,
        "source": _without_folder(spec),
        "method": method,
        "asked": asked,
        "score": {"name": SCORE, "data": name, "pictures": len(score), **result.scores} if score is not None else None,
        "parameters": {"before": parameters(student), "after": parameters(result.student)},
        "kept": {tower: [dataclasses.asdict(block) for block in blocks] for tower, blocks in result.kept.items()},
        "ranking": [
            {**dataclasses.asdict(module), "importance": value}
            for module, value in sorted(result.ranking.items(), key=lambda item: (item[0].kind == "block", -item[1]))
        ],
    }
    (out / "pruning.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def summary(result: Pruned) -> str:
    """What is left, and the scores, as lines for a terminal."""
    size = parameters(result.student)
    lines = [
        f"{tower}: {size[tower] / 1e6:.2f} M parameters; "
        + ", ".join(f"block {b.number}: {len(b.heads)} heads, {b.hidden} units" for b in blocks)
        for tower, blocks in result.kept.items()
    ]
    if result.scores:
        lines.append("score: " + ", ".join(f"{value:.3f} {when}" for when, value in result.scores.items()))
    return "\n".join(lines)


def parameters(student: Student) -> dict[str, int]:
    """Parameters of each tower."""
    towers = {"image": student.image_tower, "text": student.text_tower}
    return {name: sum(value.numel() for value in tower.parameters()) for name, tower in towers.items()}


def open_student(spec: str, *, allow_download: bool = False, trust_remote_code: bool = False) -> Student:
    """A run or student folder, or "open_clip:..." / "hf:..." converted into a student that gives equal embeddings.

    Raises:
        UsageError: none of these, or an architecture that no student has.
    """
    if spec.partition(":")[0] not in ("open_clip", "hf") or Path(spec).exists():
        return load_student(spec)
    from pocketvlm.teachers import load_teacher

    teacher = load_teacher(spec, allow_download=allow_download, trust_remote_code=trust_remote_code)
    assert isinstance(teacher, DualEncoderTeacher), "both kinds are dual encoders"
    return convert(teacher)


def convert(teacher: DualEncoderTeacher) -> Student:
    """An open_clip or Hugging Face CLIP as a student, compared with the teacher on pictures and strings.

    Raises:
        UsageError: an architecture that no student has, or whose embeddings come out different.
    """
    config = getattr(teacher.model, "config", None)
    eos = None if config is None else getattr(getattr(config, "text_config", None), "eos_token_id", None)
    # open_clip pools the highest id, and so does transformers for the checkpoints whose config still says 2
    end = int(teacher.tokenize(["a"]).max()) if eos in (None, 2) else int(eos)
    tokenizer = json.loads(teacher.tokenizer_json())
    if tokenizer["padding"]["pad_id"] == end:
        # the end token is read, so padding must look different
        first = tokenizers.Tokenizer.from_str(teacher.tokenizer_json().decode()).id_to_token(0)
        tokenizer["padding"] |= {"pad_id": 0, "pad_token": first}
    student = student_from_clip(
        teacher.model,
        name=_without_folder(teacher.name),
        image=teacher.image,
        tokenizer_json=json.dumps(tokenizer, ensure_ascii=False).encode(),
        end_id=end,
        logit_scale=teacher.logit_scale,
        licences=teacher.licences,
    )
    size = teacher.image.size
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8))
    ids = torch.from_numpy(Tokenizer(student.tokenizer_json, student.text_spec).encode(list(PROBES)))
    with torch.no_grad(), full_float32():
        pairs = (
            (student.encode_image(pixels).embedding, teacher.encode_images(pixels).embedding),
            (student.encode_text(ids).embedding, teacher.encode_texts(PROBES).embedding),
        )
    for tower, (own, theirs) in zip(TOWERS, pairs):
        difference = float((F.normalize(own, dim=-1) - theirs.cpu()).abs().max())
        if not difference <= _SAME:
            raise UsageError(
                f"the {tower} tower of {teacher.name} rebuilt as a student differs from it by {difference:.2g} where "
                f"{_SAME:.0e} is allowed, so another model would be pruned; distil from it without inheriting weights"
            )
    return student


class Retrieval:
    """Z of a student on captioned pictures: mean reciprocal rank, the mean of both directions, in (0, 1].

    Finer than recall, which one head seldom moves on some hundred pictures. Equal captions match each other's pictures;
    ties count against the model. Keeps the embeddings of the tower that did not change (`students.prune.Score`).
    groups: the concept of each query, by direction.
    """

    def __init__(self, source: DataSource, student: Student, *, batch_size: int = 64) -> None:
        """Read and prepare the pictures of `source` that have a caption (the first one counts) and can be decoded.

        Raises:
            UsageError: fewer than two different captions are left.
        """
        tokenizer = Tokenizer(student.tokenizer_json, student.text_spec)
        pixels, texts, groups = [], [], []
        for sample in source.within_context(tokenizer).samples:
            if not sample.captions:
                continue
            try:
                pixels.append(load_image(sample.image.read(), student.image_spec))
            except BadSampleError:
                continue
            texts.append(sample.captions[0].text)
            groups.append(sample.group or sample.uid)
        self.texts = list(dict.fromkeys(texts))
        if len(self.texts) < 2:
            raise UsageError(
                f"{source.name} has {len(self.texts)} different captions of readable pictures and modules are ranked "
                "by retrieval among several; nothing could be told apart, so give data with more captions"
            )
        place = {text: index for index, text in enumerate(self.texts)}
        first = dict(reversed(list(zip(texts, groups))))
        self.groups = {"image_to_text": groups, "text_to_image": [first[text] for text in self.texts]}
        self.pixels = torch.from_numpy(np.stack(pixels))
        ids = tokenizer.encode(self.texts)
        # columns of nothing but padding cost like the others and change nothing
        self.ids = torch.from_numpy(
            ids[:, : 1 + int(np.flatnonzero((ids != student.text_spec.pad_id).any(axis=0))[-1])]
        )
        self.match = torch.zeros(len(pixels), len(self.texts), dtype=torch.bool)
        self.match[torch.arange(len(texts)), torch.tensor([place[text] for text in texts])] = True
        self.batch_size = batch_size
        self._seen: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(self, student: Student, changed: str | None) -> float:
        now = {
            tower: self._embed(student, tower) if changed in (None, tower) else self._seen[tower] for tower in TOWERS
        }
        if changed is None:
            self._seen = now
        places = self._ranks(now)
        return float(sum((1 / rank.double()).mean() for rank in places.values())) / len(places)

    def ranks(self, student: Student) -> dict[str, Tensor]:
        """int64: "image_to_text" [pictures] and "text_to_image" [texts], 1 is the best; see `ranks_of`."""
        return self._ranks({tower: self._embed(student, tower) for tower in TOWERS})

    def _ranks(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        cosine = embedded["image"] @ embedded["text"].T
        return {"image_to_text": ranks_of(cosine, self.match), "text_to_image": ranks_of(cosine.T, self.match.T)}

    def _embed(self, student: Student, tower: str) -> Tensor:
        rows = self.pixels if tower == "image" else self.ids
        encode = student.encode_image if tower == "image" else student.encode_text
        device, found = student.log_scale.device, []
        with torch.inference_mode(), full_float32():
            for batch in rows.split(self.batch_size):
                found.append(F.normalize(encode(batch.to(device)).embedding.float(), dim=-1).cpu())
        return torch.cat(found)


def ranks_of(scores: Tensor, match: Tensor) -> Tensor:
    """int64 [N]: the rank of each row's best match, 1 is the first; scores, match (bool): [N, M].

    Ties count against the model, and so do scores that are not finite: their row has rank M.
    """
    best = torch.where(match, scores, -math.inf).amax(dim=1, keepdim=True)
    rank = 1 + ((scores >= best) & ~match).sum(dim=1)
    return torch.where(scores.isfinite().all(dim=1), rank, scores.shape[1])


def _without_folder(spec: str) -> str:
    """A spec or path as it may travel: kinds and names, but not where the files lay."""
    head, colon, rest = spec.partition(":")
    if not colon:
        return Path(spec).name
    return f"{head}:{Path(rest.partition('@')[0]).name or rest}"
