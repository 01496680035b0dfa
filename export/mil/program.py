"""A saved `.mlpackage`, read back and computed operation by operation, with every result rounded to its declared type.

What this shows without a Mac: whether the conversion kept the function, and what float16 storage, 8-bit or palettised
weights and 8-bit activations do to it, overflow included. What it cannot show is `NOT_MODELLED`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketvlm.edge.backends import no_tower, run_in_chunks
from pocketvlm.edge.errors import IntegrityError, UsageError, require
from pocketvlm.export.mil.ops import OPERATIONS, Arguments

NAME = "coreml-mil"
NOT_MODELLED = (
    "how the Neural Engine and GPU add up inside an operation (here: float32), operations that Core ML fuses on a "
    "device, and latency"
)
# in a bundle; its source is `export.mil.coreml_predict`
PREDICT_SCRIPT = "conformance/coreml_predict.py"
# ImageFeatureType.ColorSpace of Core ML's FeatureTypes.proto
_RGB, _BGR = 20, 30

# (type of the operation, name of its result, the value as it is stored)
Observer = Callable[[str, str, Tensor], None]


def load_package(path: Path) -> tuple[Any, Any]:
    """(protobuf specification, MIL program) of a package on disk, by coremltools' own reader.

    Raises:
        MissingExtraError: coremltools is not installed. IntegrityError: the package cannot be read or is another kind.
    """
    # coremltools announces at import, on every stream it has, that this is no Mac
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            utils = require("coremltools.models.utils", "coreml")
            milproto = require("coremltools.converters.mil.frontend.milproto.load", "coreml")
            spec = utils.load_spec(str(path))
            kind = spec.WhichOneof("Type")
            if kind != "mlProgram":
                raise IntegrityError(f"{path.name} holds a {kind}, not an ML program; export it again")
            folder = path / "Data" / "com.apple.CoreML" / "weights"
            program = milproto.load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(folder))
    except (ImportError, IntegrityError):
        raise
    except Exception as error:  # protobuf, file and loader errors share no base
        raise IntegrityError(
            f"{path.name} cannot be read back ({type(error).__name__}: {error}); no phone could load it"
        ) from error
    finally:
        logging.disable(quiet)
    return spec, program


class MilProgram:
    """One function of an ML program, ready to run.

    inputs: name -> declared shape. outputs: names. operations: how often each type of operation occurs, constants
    aside. What depends on constants alone (weights to be expanded among them) is computed once, here.

    Raises:
        UsageError: the program has an operation that `ops.OPERATIONS` does not know.
    """

    def __init__(self, function: Any, where: str = "the program") -> None:
        self.where = where
        self.inputs: dict[str, tuple[Any, ...]] = {name: tuple(v.shape) for name, v in function.inputs.items()}
        self.outputs: list[str] = [value.name for value in function.outputs]
        self.operations: dict[str, int] = {}
        self._declared = {name: _type_name(value) for name, value in function.inputs.items()}
        self._constants: dict[str, Any] = {}
        self._steps: list[Any] = []
        _refuse_unknown(function, where)
        for operation in function.operations:
            kind = operation.op_type
            if kind == "const":
                self._constants[operation.outputs[0].name] = _value(operation.outputs[0].val)
                continue
            self.operations[kind] = self.operations.get(kind, 0) + 1
            if kind.startswith("constexpr_"):
                self._expand(operation)
            elif self._fixed(operation):
                self._run_step(operation, self._constants, None)
            else:
                self._steps.append(operation)

    def run(self, inputs: Mapping[str, NDArray[Any] | Tensor], observe: Observer | None = None) -> dict[str, Tensor]:
        """Outputs by name, float32 (holding float16 numbers where the program says so), int32 or bool.

        observe: called with every result that depends on the inputs, in order.

        Raises:
            UsageError: other inputs than the program's. IntegrityError: an operation cannot be carried out.
        """
        if set(inputs) != set(self.inputs):
            raise UsageError(
                f"{self.where} takes the inputs {sorted(self.inputs)} and {sorted(inputs)} were given; it cannot run, "
                "so give each of them once"
            )
        values = dict(self._constants)
        with torch.no_grad():
            for name, value in inputs.items():
                values[name] = stored(torch.as_tensor(value), self._declared[name])
            for operation in self._steps:
                self._run_step(operation, values, observe)
        return {name: values[name] for name in self.outputs}

    def _fixed(self, operation: Any) -> bool:
        return all(
            part.name in self._constants
            for value in operation.inputs.values()
            if value is not None
            for part in (value if isinstance(value, (list, tuple)) else (value,))
        )

    def _expand(self, operation: Any) -> None:
        """Palettised, quantized and sparse weights by coremltools' own arithmetic for them."""
        found = operation.materialized_val_inference()
        parts = found if isinstance(found, (list, tuple)) else (found,)
        for output, part in zip(operation.outputs, parts):
            self._constants[output.name] = stored(_value(part), _type_name(output))

    def _run_step(self, operation: Any, values: dict[str, Any], observe: Observer | None) -> None:
        arguments = {
            name: [values[v.name] for v in value] if isinstance(value, (list, tuple)) else values[value.name]
            for name, value in operation.inputs.items()
            if value is not None
        }
        named = f"operation {operation.op_type!r} of {self.where} (output {operation.outputs[0].name!r})"
        try:
            result = OPERATIONS[operation.op_type](Arguments(arguments))
        except Exception as error:  # torch raises whatever fits
            raise IntegrityError(
                f"{named} cannot be carried out ({type(error).__name__}: {str(error).splitlines()[0]}); the package is "
                "damaged or was given values it cannot take, so export it again"
            ) from error
        results = result if isinstance(result, tuple) else (result,)
        for output, value in zip(operation.outputs, results):
            values[output.name] = kept = stored(value, _type_name(output))
            declared = tuple(output.shape)
            if len(declared) != kept.ndim or any(
                isinstance(size, int) and size != found for size, found in zip(declared, kept.shape)
            ):
                raise IntegrityError(
                    f"{named} gives shape {list(kept.shape)} where the package declares {list(declared)}; its "
                    "attributes contradict each other, so export it again"
                )
            if observe is not None:
                observe(operation.op_type, output.name, kept)


def stored(value: Any, kind: str) -> Any:
    """`value` as a result of the declared type: float16 is rounded (and overflows), floats become integers by cutting.

    kind: MIL's name of the element type, such as "fp16". Strings are left alone.
    """
    if not isinstance(value, Tensor):
        return value
    if kind == "fp16":
        return value.to(torch.float16).to(torch.float32)
    if kind == "bool":
        return value.to(torch.bool)
    return value.to(torch.float32 if kind in ("fp32", "fp64") else torch.int32)


def _refuse_unknown(function: Any, where: str) -> None:
    for operation in function.operations:
        kind = operation.op_type
        if kind != "const" and not kind.startswith("constexpr_") and kind not in OPERATIONS:
            raise UsageError(
                f"{where} has the operation {kind!r} (output {operation.outputs[0].name!r}), which {NAME} does not "
                "evaluate; nothing can be said about this file's numbers here, so add it to export/mil/ops.py or run "
                f"the bundle's {PREDICT_SCRIPT} on a Mac"
            )


def _type_name(value: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(value.dtype))


def _value(value: Any) -> Any:
    """A constant as it travels: tensors of float32, int32 or bool, and strings."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        return str(value)
    kinds = {"f": np.float32, "b": np.bool_}
    return torch.from_numpy(np.array(array, dtype=kinds.get(array.dtype.kind, np.int32)))


# --- as a runtime ---------------------------------------------------------------------------------------------------


class MilBackend:
    """The `edge.backends.Backend` of Core ML packages on systems without Core ML; one row at a time.

    overflow: tower -> the first result that was not finite in any run so far, for people.

    Raises:
        IntegrityError, MissingExtraError, UsageError: see `load_package` and `MilProgram`.
    """

    name = NAME
    threads = 1

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.overflow: dict[str, str] = {}
        self._towers: dict[str, tuple[MilProgram, Any]] = {}
        for tower, path in files.items():
            spec, program = load_package(path)
            function = program.functions[spec.description.defaultFunctionName or "main"]
            self._towers[tower] = (MilProgram(function, path.name), spec.description.input[0])

    def operations(self, tower: str) -> dict[str, int]:
        """How often each type of operation occurs in a tower."""
        return self._towers[tower][0].operations

    def run_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] to float32 [B, D]."""
        return self._run("image", pixels)

    def run_text(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """int32 [B, L] to float32 [B, D]."""
        return self._run("text", ids)

    def _run(self, tower: str, rows: NDArray[Any]) -> NDArray[np.float32]:
        if tower not in self._towers:
            raise no_tower(tower, self.name)
        program, entry = self._towers[tower]

        def call(row: NDArray[Any]) -> NDArray[np.float32]:
            found = program.run({entry.name: as_input(entry, row)})[program.outputs[0]]
            if tower not in self.overflow and not torch.isfinite(found).all():
                self.overflow[tower] = first_overflow(program, {entry.name: as_input(entry, row)})
            return found.float().numpy().reshape(len(row), -1)

        return run_in_chunks(call, rows, 1)


def as_input(entry: Any, rows: NDArray[Any]) -> NDArray[Any]:
    """One row as Core ML hands it to the program: planes [1, 3, S, S] in the declared colour order for an image input
    (an image's scale and bias are operations of the program), else the array as it is.

    Raises:
        IntegrityError: an image of neither RGB nor BGR.
    """
    if entry.type.WhichOneof("Type") != "imageType":
        return rows
    order = entry.type.imageType.colorSpace
    if order not in (_RGB, _BGR):
        raise IntegrityError(
            f"input {entry.name!r} is an image of colour space {order}, expected RGB ({_RGB}) or BGR ({_BGR}); "
            "a picture would reach the graph garbled, so export it again"
        )
    planes = rows.transpose(0, 3, 1, 2).astype(np.float32)
    return np.ascontiguousarray(planes if order == _RGB else planes[:, ::-1])


def first_overflow(program: MilProgram, inputs: Mapping[str, NDArray[Any]]) -> str:
    """Which result is the first with NaN or Inf, as text; empty where there is none."""
    found: list[str] = []

    def look(kind: str, name: str, value: Tensor) -> None:
        # a mask of -inf is chosen, not computed
        if not found and kind != "select" and value.is_floating_point() and not torch.isfinite(value).all():
            largest = value.abs().nan_to_num(math.inf, math.inf).max()
            found.append(f"{kind} {name!r} is the first result that is not finite (largest {float(largest)})")

    program.run(inputs, look)
    return found[0] if found else ""
