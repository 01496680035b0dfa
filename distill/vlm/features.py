"""What a frozen vision trunk gives for a fixed list of scenes, computed once and kept in half precision.

Of a step that trains connector and decoder the trunk would be a third or more on a CPU, and its result never changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketvlm.distill.vlm.batches import Composer
from pocketvlm.distill.vlm.scene_list import SceneList
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.model import Vlm
from pocketvlm.students.vlm.vision import VisionTower

_BATCH = 32


class KeptTrunk(nn.Module):
    """Stands where a vision tower stood and passes its kept outputs on: [B, K, C] of any float type to the tower's."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.grid, self.width, self.tokens = tower.grid, tower.width, tower.tokens
        self.dtype = tower.shift.dtype

    def forward(self, features: Tensor) -> Tensor:
        return features.to(self.dtype)


@contextlib.contextmanager
def without_trunk(model: Vlm) -> Iterator[Vlm]:
    """Inside, the model takes `Features` where it took pixels, and has no parameters of vision; after, all is back, and
    the tower is in the mode that the model is in then.

    Raises:
        UsageError: a model that leaves out visual tokens by what its tower attends to, which features do not tell.
    """
    if model.reduction is not None and model.reduction.scored and model.reduction.score != "distinct":
        raise UsageError(
            f"the model scores its visual tokens by {model.reduction.score!r}, which kept features of its tower do not "
            "tell; train it with its pixels by adding vision to train, or choose another reduction"
        )
    tower = model.vision
    model.vision = KeptTrunk(tower)  # type: ignore[assignment]
    try:
        yield model
    finally:
        model.vision = tower.train(model.training)


class Features:
    """float16 [N, K, C] of N scenes on disk, read by rows."""

    def __init__(self, values: np.ndarray[Any, np.dtype[np.float16]]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __call__(self, chosen: Sequence[int]) -> Tensor:
        """float16 [B, K, C]."""
        return torch.from_numpy(np.ascontiguousarray(self.values[list(chosen)]))

    def only(self, numbers: Sequence[int]) -> Features:
        """Of these scenes, in memory (`SceneList.only`)."""
        return Features(self.values[list(numbers)])


def trunk_digest(model: Vlm) -> str:
    """sha256 of the vision tower's configuration and weights."""
    whole = hashlib.sha256(model.config.vision.model_dump_json().encode())
    for name, value in sorted(model.vision.state_dict().items()):
        whole.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


@torch.no_grad()
def trunk_features(
    model: Vlm,
    scenes: SceneList,
    composer: Composer,
    folder: Path,
    *,
    bfloat16: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Features:
    """The trunk's outputs for the whole list, computed where `folder` does not hold them yet.

    The file's name is a digest of trunk, pictures and scenes, so that another trunk or list never reads it. bfloat16:
    autocast of the trunk, twice as fast on a CPU that has its instructions.

    Raises:
        UsageError: an output that half precision cannot hold.
    """
    name = hashlib.sha256(f"{trunk_digest(model)}:{scenes.scene_digest}:{bfloat16}".encode()).hexdigest()[:24]
    path = folder / f"trunk-{name}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        was, device = model.vision.training, model.device
        model.vision.eval()
        try:
            shape = (len(scenes), model.vision.tokens, model.vision.width)
            values = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
            for start in range(0, len(scenes), _BATCH):
                chosen = range(start, min(start + _BATCH, len(scenes)))
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    found = model.vision(scenes.pixels(chosen, composer).to(device)).half().cpu()
                if not bool(found.isfinite().all()):
                    raise UsageError(
                        f"the vision trunk {model.config.vision.backbone!r} gives values above 65,504, which float16 "
                        "cannot keep; train it with its pixels by adding vision to train"
                    )
                values[chosen.start : chosen.stop] = found.numpy()
                if start % (16 * _BATCH) == 0:
                    say(f"trunk features: {chosen.stop} of {len(scenes)} scenes")
            values.flush()
            del values
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
            model.vision.train(was)
    return Features(np.load(path, mmap_mode="r"))
