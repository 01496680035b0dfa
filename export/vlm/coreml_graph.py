"""Core ML packages of a generative student for iOS 18, macOS 15 and later: picture, words, and a decoder with states.

`picture` takes an RGB image and gives `prefix` [1, P, W]; `words` takes `ids` (int32 [1, T]) and gives `embeddings`
[T, W]; `decoder` takes `embeddings` [T, W] (the prefix and the prompt's words first, then one word at a time) and
`positions` (int32 [T]), keeps keys and values as states, and gives `logits` [1, V] of the next token. States are
float16 by Core ML's rules, and so is the arithmetic. Prediction needs macOS: here packages are converted, read back and
compared with what they should take, give and keep, and the step without states is computed by `export.mil` in tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pocketvlm
from pocketvlm.edge.errors import IntegrityError, require
from pocketvlm.edge.vlm_bundle import VlmContract
from pocketvlm.edge.vlm_onnxruntime import cache_names
from pocketvlm.export.targets.coreml import fix_identifiers
from pocketvlm.export.targets.onnx import quiet
from pocketvlm.export.vlm.graphs import Picture, Step, checked_step, empty_caches
from pocketvlm.students.vlm.model import Vlm

DEPLOYMENT_TARGET = "iOS18"
_SPECIFICATION_VERSION = 9  # what iOS 18 and macOS 15 introduced; the first with states


class CoreMLWriter:
    """fp16, and w8: weights and the token table in int8 with a scale per output channel (row)."""

    def __init__(self, model: Vlm, contract: VlmContract) -> None:
        with quiet():
            require("coremltools", "coreml")
        self._model, self._contract = model, contract
        self._step = checked_step(model, products=True)

    def write(self, precision: str, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        """The three packages: paths under `folder`, and notes.

        Raises:
            IntegrityError: what was read back has other inputs, outputs or states.
        """
        import coremltools as ct

        contract, weight = self._contract, self._model.decoder.embed_tokens.weight
        length = ct.RangeDim(1, contract.context_length, default=contract.prefix + 3)
        side = contract.image.size
        planes = torch.zeros(1, 3, side, side)
        image = ct.ImageType("pixels", shape=tuple(planes.shape), color_layout=ct.colorlayout.RGB)
        ids = torch.zeros(1, contract.prefix + 3, dtype=torch.int32)
        words = ct.TensorType("ids", shape=(1, length), dtype=np.int32)
        x = torch.zeros(contract.prefix + 3, contract.width)
        positions = torch.arange(contract.prefix + 3, dtype=torch.int32)
        steps = [
            ct.TensorType("embeddings", shape=(length, contract.width), dtype=np.float32),
            ct.TensorType("positions", shape=(length,), dtype=np.int32),
        ]
        names = cache_names(contract.layers)
        kept = [
            ct.StateType(wrapped_type=ct.TensorType(shape=contract.cache_shape, dtype=np.float16), name=name)
            for name in names
        ]
        parts = {
            "picture": (_FromPlanes(Picture(self._model)), (planes,), [image], ["prefix"], []),
            "words": (_Words(weight), (ids,), [words], ["embeddings"], []),
            "decoder": (Stateful(self._step, self._model), (x, positions), steps, ["logits"], kept),
        }
        files, facts = {}, {}
        for part, (module, example, inputs, outputs, states) in parts.items():
            files[part] = f"coreml/{part}-{precision}.mlpackage"
            path = folder / files[part]
            path.parent.mkdir(parents=True, exist_ok=True)
            with quiet():
                converted = convert(module, example, inputs, outputs, states)
                if precision == "w8":
                    converted = _in_int8(converted, contract.context_length * contract.head_width)
                converted.short_description = f"{contract.name}: {part}, {precision}"
                converted.version = pocketvlm.__version__
                converted.user_defined_metadata["pocketvlm.contract_sha256"] = contract.digest()
                converted.save(str(path))
                fix_identifiers(path)
                taken = [entry.name for entry in inputs]
                facts[part] = check_package(path, taken, outputs, [state.name for state in states])
        return files, {
            "scheme": "float16" if precision == "fp16" else "int8-per-channel",
            "minimum_deployment_target": DEPLOYMENT_TARGET,
            "numerics": "converted and read back; prediction was not run (it needs macOS)",
            "operations": facts,
        }


class Stateful(nn.Module):
    """The step with its caches as buffers that it changes, and the output layer."""

    def __init__(self, step: Step, model: Vlm) -> None:
        super().__init__()
        self.step, self.names = step, cache_names(len(step.layers))
        for name, cache in zip(self.names, empty_caches(model.decoder)):
            self.register_buffer(name, cache)
        self.head = nn.Parameter(model.decoder.embed_tokens.weight.detach(), requires_grad=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        hidden, *written = self.step(x, positions, *(getattr(self, name) for name in self.names))
        for name, cache in zip(self.names, written):
            getattr(self, name)[:] = cache
        return nn.functional.linear(hidden, self.head)


class _FromPlanes(nn.Module):
    """Takes the planar float image [1, 3, S, S] that Core ML makes of a pixel buffer."""

    def __init__(self, picture: nn.Module) -> None:
        super().__init__()
        self.picture = picture

    def forward(self, planes: Tensor) -> Tensor:
        return self.picture(planes.permute(0, 2, 3, 1))


class _Words(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table.detach())

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids[0])


def convert(module: nn.Module, example: tuple[Tensor, ...], inputs: list[Any], outputs: list[str], states: list[Any],
            *, half: bool = True) -> Any:  # fmt: skip
    """A traced module as an ML program. half: float16 arithmetic, else float32 (which no states allow)."""
    import coremltools as ct

    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
    return ct.convert(
        traced,
        inputs=inputs,
        outputs=[ct.TensorType(name, dtype=np.float32) for name in outputs],
        states=states or None,
        convert_to="mlprogram",
        minimum_deployment_target=getattr(ct.target, DEPLOYMENT_TARGET),
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        skip_model_load=True,
    )


def _in_int8(converted: Any, tables: int) -> Any:
    """Weights in int8 with a scale per output channel; what is no larger than the tables of positions, of that many
    elements, stays float16 with them."""
    import coremltools.optimize.coreml as cto

    linear = cto.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int8", granularity="per_channel", weight_threshold=tables + 1
    )
    return cto.linear_quantize_weights(converted, cto.OptimizationConfig(global_config=linear))


def check_package(path: Path, inputs: list[str], outputs: list[str], states: list[str]) -> int:
    """How many operations a saved package has, read back from disk.

    Raises:
        IntegrityError: it takes, gives or keeps something else.
    """
    utils = require("coremltools.models.utils", "coreml")
    spec = utils.load_spec(str(path))
    description = spec.description
    found = {
        "specification version": spec.specificationVersion,
        "inputs": [entry.name for entry in description.input],
        "outputs": [entry.name for entry in description.output],
        "states": sorted(entry.name for entry in description.state),
    }
    expected = {
        "specification version": _SPECIFICATION_VERSION,
        "inputs": inputs,
        "outputs": outputs,
        "states": sorted(states),
    }
    for key, value in expected.items():
        if found[key] != value:
            raise IntegrityError(
                f"{path.name}, read back from disk, has {key} {found[key]} and {value} is expected; an app would feed "
                "it wrongly, so the export was stopped: report this with the student's name"
            )
    function = spec.mlProgram.functions["main"]
    return len(function.block_specializations[function.opset].operations)
