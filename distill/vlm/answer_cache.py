"""A generative teacher's distributions over a fixed list of scenes, cut to the largest entries and kept on disk.

The teacher reads each scene once, with the list's own answers before each token (teacher forcing), however often and
however many students then learn from it. Kept: for each answer token the `top` largest log-shares with the rest's, the
same for each place of the picture where asked for, and of the visual tokens' hidden states Y [K, W] the triangle R of
Y^T = Q R, transposed: [K, K] with the Gram matrix of Y, which is all that `relation_distance` sees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from pocketvlm.distill.vlm.batches import Composer
from pocketvlm.distill.vlm.scene_list import SceneList
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.students.vlm.model import Vlm
from pocketvlm.teachers.files import sha256_file, write_atomic
from pocketvlm.teachers.top_logits import id_dtype, largest

REQUEST, MANIFEST = "request.json", "answers.json"
_PART = 256
_BATCH = 16


class Taught(NamedTuple):
    """What the teacher says of one batch. ids [N, k] and logs [N, k + 1] of its answer tokens (`kept_divergence`); of
    its pictures' places [B, K, k] and [B, K, k + 1], and relations [B, K, K], or None."""

    ids: Tensor
    logs: Tensor
    place_ids: Tensor | None
    place_logs: Tensor | None
    relations: Tensor | None

    def to(self, device: torch.device) -> Taught:
        places = [None if value is None else value.to(device, non_blocking=True) for value in self[2:]]
        return Taught(self.ids.to(device), self.logs.to(device), *places)


def model_digest(model: Vlm) -> str:
    """sha256 of a model's configuration, tokenizer, weights, and of the type that it computes in."""
    weight = model.decoder.embed_tokens.weight
    whole = hashlib.sha256(f"{model.config.model_dump_json()}{weight.dtype}".encode() + model.tokenizer.json)
    for name, value in sorted(model.state_dict().items()):
        whole.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def check_vocabulary(teacher: Vlm, tokenizer_json: bytes) -> None:
    """Whether logits of this teacher and of a student with that tokenizer mean the same tokens.

    Raises:
        UsageError: they do not.
    """
    if teacher.tokenizer.json != tokenizer_json:
        raise UsageError(
            f"a same-vocabulary loss (response, visual or on-policy) was asked of teacher {teacher.config.name!r}, "
            "whose tokenizer is not the student's, so entry i of its logits would teach another token; build the "
            "student with the teacher's tokenizer.json, or set those weights to 0 and learn from its answers alone"
        )


def tokens_digest(scenes: SceneList) -> str:
    return hashlib.sha256(scenes.tokenizer_json).hexdigest()


class KeptAnswers:
    """Opened by `kept_answers`; `of(chosen)` gives the rows of some scenes, in the order of `SceneList.rows`."""

    def __init__(self, scenes: SceneList, parts: Sequence[dict[str, Tensor]]) -> None:
        self.scenes = scenes
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def of(self, chosen: Sequence[int]) -> Taught:
        places, rows = self.scenes.token_places(chosen), torch.tensor(list(chosen))
        seen = self.tensors
        return Taught(
            seen["ids"][places],
            seen["logs"][places].float(),
            seen["place_ids"][rows] if "place_ids" in seen else None,
            seen["place_logs"][rows].float() if "place_logs" in seen else None,
            seen["relations"][rows].float() if "relations" in seen else None,
        )

    @property
    def bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


@torch.no_grad()
def teach(teacher: Vlm, scenes: SceneList, chosen: Sequence[int], seen: Tensor, top: int, places: bool) -> Taught:
    """One forward of the teacher: what a cache keeps of it. seen: what its `picture` takes."""
    rows = scenes.rows(chosen).to(seen.device)
    hidden, text = teacher.hidden(seen, rows), rows.ids.shape[1]
    answers = hidden[:, -text:].flatten(0, 1)[rows.places]
    logs, ids = largest(_log_shares(teacher, answers), top)
    visual = hidden[:, 1:-text].float()
    if not places:
        return Taught(ids, logs, None, None, gram_root(visual))
    place_logs, place_ids = largest(_log_shares(teacher, visual.flatten(0, 1)), top)
    shape = visual.shape[:2]
    return Taught(ids, logs, place_ids.unflatten(0, shape), place_logs.unflatten(0, shape), gram_root(visual))


def _log_shares(teacher: Vlm, hidden: Tensor) -> Tensor:
    """[N, V] in float32, whatever the teacher computes in: logits of half precision would be rounded by up to 0.03."""
    return F.linear(hidden.float(), teacher.decoder.embed_tokens.weight.float()).log_softmax(dim=1)


def gram_root(visual: Tensor) -> Tensor:
    """[B, K, K] with the Gram matrices of visual [B, K, W] over their size: L with L L^T = Y Y^T / |Y|^2."""
    unit = visual / visual.flatten(1).norm(dim=1)[:, None, None]
    return torch.linalg.qr(unit.transpose(1, 2), mode="r").R.transpose(1, 2)


def kept_answers(
    folder: Path,
    scenes: SceneList,
    *,
    top: int,
    teacher: Vlm | None = None,
    composer: Composer | None = None,
    places: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> KeptAnswers:
    """Open the cache of this list, or make it, or go on making it.

    Args:
        folder: of this one list. top: k, at most the vocabulary. teacher, composer: None opens what is complete;
            the teacher is then not needed at all. places: keep the distributions at the picture's places too.

    Raises:
        UsageError: nothing complete and no teacher, a teacher of another vocabulary, or k out of range.
        IntegrityError: a file is damaged, or the cache is of another teacher, tokenizer or list.
    """
    if teacher is not None:
        check_vocabulary(teacher, scenes.tokenizer_json)
        if not 1 <= top <= teacher.tokenizer.vocab_size:
            raise UsageError(
                f"the {top} largest of {teacher.tokenizer.vocab_size} shares were asked for, which there are not; ask "
                "for 1 to as many as there are tokens"
            )
    asked = {
        "scenes": scenes.digest,
        "tokenizer": tokens_digest(scenes),
        "top": top,
        "places": places,
        "parts": -(-len(scenes) // _PART),
    }
    if teacher is not None:
        asked["teacher"] = model_digest(teacher)
    _check_request(folder, asked)
    if not (folder / MANIFEST).is_file():
        if teacher is None or composer is None:
            raise UsageError(
                f"folder {str(folder)!r} holds no finished answers of a teacher and none is given to make them; give "
                "the teacher's folder"
            )
        write_atomic(folder / REQUEST, json.dumps(asked, indent=1).encode())
        _make(folder, scenes, teacher, composer, top, places, say)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    parts = []
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise IntegrityError(
                f"{name} in {str(folder)!r} is missing or was damaged, so the teacher would be misquoted; delete the "
                "folder and let the teacher answer again"
            )
        parts.append(load_file(path))
    return KeptAnswers(scenes, parts)


def _check_request(folder: Path, asked: dict[str, object]) -> None:
    if not (folder / REQUEST).is_file():
        return
    found = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    what = {"scenes": "list of scenes", "tokenizer": "tokenizer", "top": "number of entries", "teacher": "teacher"}
    for key, value in asked.items():
        if found.get(key) != value:
            raise IntegrityError(
                f"the answers in {str(folder)!r} are of another {what.get(key, key)}, so rows would not belong "
                "together; name another folder, or delete this one to let the teacher answer again"
            )


def _make(
    folder: Path,
    scenes: SceneList,
    teacher: Vlm,
    composer: Composer,
    top: int,
    places: bool,
    say: Callable[[str], None],
) -> None:
    narrow = id_dtype(teacher.tokenizer.vocab_size)
    files = {}
    was = teacher.training
    teacher.eval()
    for number, start in enumerate(range(0, len(scenes), _PART)):
        end = min(start + _PART, len(scenes))
        path = folder / f"answers-{number:05d}.safetensors"
        if not (path.is_file() and _readable(path)):
            rows: list[Taught] = []
            for first in range(start, end, _BATCH):
                chosen = range(first, min(first + _BATCH, end))
                seen = scenes.pixels(chosen, composer).to(teacher.device)
                rows.append(teach(teacher, scenes, chosen, seen, top, places))
            joined = {
                name: torch.cat([getattr(row, name) for row in rows])
                for name in Taught._fields
                if getattr(rows[0], name) is not None
            }
            kinds = {"ids": narrow, "place_ids": narrow}
            whole = {
                name: value.to("cpu", kinds.get(name, torch.float16)).contiguous() for name, value in joined.items()
            }
            write_atomic(path, save_tensors(whole))
        files[path.name] = sha256_file(path)
        say(f"teacher's answers: {end} of {len(scenes)} scenes")
    teacher.train(was)
    write_atomic(folder / MANIFEST, json.dumps({"files": files}, indent=1).encode())


def _readable(path: Path) -> bool:
    try:
        load_tensors(path.read_bytes())
    except Exception:  # the Rust side raises its own kinds
        return False
    return True
