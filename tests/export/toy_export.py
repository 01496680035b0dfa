"""Minute towers for the export tests: everything the exporters find hard, in a few thousand weights.

The image tower has batch norm with real statistics, ReLU6, a depthwise convolution and a residual sum; the text tower
has a token table large enough to be quantized and attention over a padding mask.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec, ModelContract, TextSpec
from pocketvlm.export.targets.base import Calibration, Towers

SIZE, LENGTH, DIM, VOCAB = 24, 10, 32, 2000


class ImageToy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True))
        self.depth = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True)
        )
        self.point = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.Conv2d(16, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6(inplace=True))
        self.projection = nn.Linear(128, DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.permute(0, 3, 1, 2).to(self.projection.weight.dtype) - 127.5) / 127.5
        x = self.stem(x)
        x = x + self.point(self.depth(x))
        return F.normalize(self.projection(self.head(x).mean((2, 3))), dim=-1)


class TextToy(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.token = nn.Embedding(VOCAB, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.projection = nn.Linear(width, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position
        real = (ids != 0).to(x.dtype)
        qkv = self.qkv(self.norm(x)).reshape(-1, LENGTH, 3, self.heads, self.width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) * 0.25 + (1 - real)[:, None, None, :] * -1e4
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, LENGTH, self.width))
        pooled = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1.0)
        return F.normalize(self.projection(pooled), dim=-1)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Smooth coloured pictures; noise alone would leave every activation alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    rows = []
    for _ in range(count):
        f, phase = rng.uniform(1, 12, (3, 2)), rng.uniform(0, 6.28, 3)
        rows.append(np.stack([127 + 127 * np.sin(f[c, 0] * x + f[c, 1] * y + phase[c]) for c in range(3)], -1))
    return np.stack(rows).round().astype(np.uint8)


def sentences(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = np.zeros((count, LENGTH), np.int32)
    for row in ids:
        length = rng.integers(3, LENGTH)
        row[:length] = rng.integers(1, VOCAB, length)
    return ids


def toy_towers() -> Towers:
    torch.manual_seed(0)
    image, text = ImageToy(), TextToy()
    with torch.no_grad():
        image.train()
        for seed in range(4):  # running statistics of real batches
            image(torch.from_numpy(pictures(32, seed)))
        # an uneven scale per channel, as trained depthwise layers have it
        image.depth[1].weight.copy_(torch.linspace(0.2, 3.0, 16))
    contract = ModelContract(
        kind="dual",
        name="toy",
        model_id="toy-0",
        space_id="toy-0",
        embed_dim=DIM,
        dims=(DIM,),
        image=ImageSpec(size=SIZE),
        text=TextSpec(context_length=LENGTH, vocab_size=VOCAB),
        logit_scale=10.0,
    )
    return Towers(image.eval().requires_grad_(False), text.eval().requires_grad_(False), contract)


def toy_calibration(count: int = 64) -> Calibration:
    return Calibration(pictures(count, 100), sentences(count, 100), "toy pictures and random ids")
