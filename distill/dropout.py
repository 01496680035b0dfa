"""Dropout and drop-path whose masks belong to samples: the same whatever rank or part of a batch a sample is in.

A mask is a function of (seed, step, the sample and what is seen of it, layer), made by counting and mixing on the
device that the tensor is on, the same on all. No generator is drawn from, so nothing need be kept to make a mask again.

Sources: dropout (Srivastava et al. 2014, JMLR 15), stochastic depth (Huang et al. 2016, 1603.09382), the mixing of
SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195). Keying them by sample is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.masking import statistics_kept
from pocketvlm.distill.taps import gray
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import Student

# 2^64 over the golden ratio, and the two factors of the mix, as int64
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def row_keys(
    seed: int,
    step: int,
    texts: Sequence[str],
    uids: Sequence[str] = (),
    views: Sequence[int] = (),
    captions: Sequence[str | None] = (),
) -> tuple[Tensor, Tensor]:
    """Keys of a step's pictures, int64 [B], and of its captions and then texts, int64 [C + T].

    views, captions: of each picture. A caption's key holds its picture, so that several of one picture differ.
    """
    shown = [f"picture/{uid}/{view}" for uid, view in zip(uids, views)]
    said = [f"caption/{uid}/{text}" for uid, text in zip(uids, captions) if text is not None]
    return sample_keys(shown, seed, step), sample_keys([*said, *(f"text/{text}" for text in texts)], seed, step)


def sample_keys(names: Iterable[str], seed: int, step: int) -> Tensor:
    """int64 [N], one key for each row's name at a 0-based step."""
    found = [stable_hash(f"drop/{seed}/{step}/{name}") for name in names]
    return torch.from_numpy(np.array(found, np.uint64).view(np.int64))


class _Rows:
    """The keys of the rows that are on their way through a tower: int64 [B]."""

    keys: Tensor | None = None


_NOW = _Rows()


@contextmanager
def rows_keyed(keys: Tensor | None, again: str = "") -> Iterator[None]:
    """Keyed layers inside the `with` see rows of these keys, int64 [B]. again: names a further forward of the same rows
    in one step, which then has masks of its own."""
    before, _NOW.keys = _NOW.keys, keys if keys is None or not again else keys + _signed(again)
    try:
        yield
    finally:
        _NOW.keys = before


def current_keys() -> Tensor | None:
    """Those of the `rows_keyed` around, which a forward that is repeated in the backward must see again."""
    return _NOW.keys


# one operation to a compiler: inductor takes the constants below for int32 on CUDA, and drops other numbers on a CPU
@torch.library.custom_op(
    "pocketvlm::kept", mutates_args=(), schema="(Tensor keys, int layer, SymInt count, float rate) -> Tensor"
)
def kept(keys: Tensor, layer: int, count: int, rate: float) -> Tensor:
    """bool [B, count]: which of `count` numbers of each row stay; each goes with probability `rate`, to 2^-17.

    The first ones of a row do not depend on `count`, so a text's do not on the padding behind it.
    """
    words = _mixed(keys + layer)[:, None] + _STEP * torch.arange(1, (count + 3) // 4 + 1, device=keys.device)
    return (_mixed(words).view(torch.int16)[:, :count] >= _dropped(rate) - 2**15).contiguous()


@kept.register_fake
def _(keys: Tensor, layer: int, count: int, rate: float) -> Tensor:
    return keys.new_empty(len(keys), count, dtype=torch.bool)


def _dropped(rate: float) -> int:
    """Of the 2^16 values of an int16, how many mean that a number goes."""
    return min(round(rate * 2**16), 2**16 - 1)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's function of int64s, modulo 2^64."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    # torch shifts the sign in
    return (x >> places) & ((1 << (64 - places)) - 1)


def _signed(name: str) -> int:
    return stable_hash(name) - 2**63


class KeyedDropout(nn.Dropout):
    """`nn.Dropout` of the rows of `rows_keyed`. layer: tells it from the others. What stays is divided by its share.

    Input [B k, ...] for B keys: k neighbours belong to one row.
    """

    def __init__(self, rate: float, layer: str) -> None:
        super().__init__(rate)
        self.layer = _signed(layer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keys = _keys_for(x)
        keep = kept(keys, self.layer, x.numel() // len(keys), self.p).view(x.shape)
        return torch.where(keep, x * (2**16 / (2**16 - _dropped(self.p))), x.new_zeros(()))


class KeyedDropPath(nn.Module):
    """timm's `DropPath` of the rows of `rows_keyed`: a row's whole branch stays or goes."""

    def __init__(self, drop_prob: float, scale_by_keep: bool, layer: str) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep, self.layer = drop_prob, scale_by_keep, _signed(layer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keys = _keys_for(x)
        keep = kept(keys, self.layer, x.shape[0] // len(keys), self.drop_prob).reshape(-1, *[1] * (x.ndim - 1))
        scale = 2**16 / (2**16 - _dropped(self.drop_prob)) if self.scale_by_keep else 1.0
        return torch.where(keep, x * scale, x.new_zeros(()))


def _keys_for(x: Tensor) -> Tensor:
    keys = _NOW.keys
    assert keys is not None, "whoever runs a student in training mode says which rows it sees"
    if x.shape[0] % len(keys):
        raise UsageError(
            f"a layer of the student drops parts of {x.shape[0]} rows where {len(keys)} samples are on their way, so "
            "no row belongs to a sample; set the dropout and drop-path rates of this backbone to 0"
        )
    return keys


def key_by_sample(student: Student) -> bool:
    """Put keyed layers in the place of the dropout and drop-path of both towers; whether there are any.

    Parameters and names stay. Left as they are: dropout inside fused attention, and what a trunk calls as a function
    (but the dropout before the classifier of EfficientNet and MobileNet families); see `drawn_otherwise`.
    """
    tower: Any = student.image_tower
    trunk = tower.trunk
    if tower.has_blocks and getattr(trunk, "drop_rate", 0) and isinstance(trunk.classifier, nn.Identity):
        trunk.classifier, trunk.drop_rate = nn.Dropout(trunk.drop_rate), 0.0
    for path, parent in list(student.named_modules()):
        for name, child in list(parent.named_children()):
            keyed: nn.Module | None = None
            if type(child) is nn.Dropout and child.p:
                keyed = KeyedDropout(child.p, f"{path}.{name}")
            elif type(child) is DropPath and child.drop_prob:
                keyed = KeyedDropPath(child.drop_prob, child.scale_by_keep, f"{path}.{name}")
            if keyed is not None:
                setattr(parent, name, keyed.train(child.training))
    return any(isinstance(module, (KeyedDropout, KeyedDropPath)) for module in student.modules())


class _Draws(TorchDispatchMode):
    """Hears every call that draws from a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def drawn_otherwise(student: Student) -> str:
    """One sentence on what a training forward of the student still draws from a generator, or ""."""
    pixels, training = gray(student).expand(2, -1, -1, -1), student.training
    ids = torch.ones(2, student.text_spec.context_length, dtype=torch.int32, device=pixels.device)
    student.train()
    try:
        with statistics_kept(student), rows_keyed(torch.arange(2, device=pixels.device)), _Draws() as draws:
            student(pixels, ids)
    finally:
        student.train(training)
    if not draws.names:
        return ""
    return (
        f"{student.config.name} draws random numbers that belong to no sample ({', '.join(sorted(draws.names))}: "
        "dropout inside fused attention, or in a function of the backbone), so another number of ranks or parts trains "
        "another student; set these rates to 0 where that matters"
    )
