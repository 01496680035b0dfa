"""What the frozen part of the image tower below `train.cut_after_block` gives, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pocketvlm.data import cache_dir
from pocketvlm.distill.prepare import Prepared
from pocketvlm.distill.taps import gray
from pocketvlm.students.student import weights_digest
from pocketvlm.teachers.files import write_atomic


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
