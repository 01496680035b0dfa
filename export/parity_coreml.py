"""Core ML packages without a Mac: read back from disk, their structure checked, their numbers by `coreml-mil`.

Structure: the declared inputs and outputs, the program's own output shape, that every stored constant is finite, and
how many of the recorded weights are found among the constants (folding a batch normalisation changes a convolution's
weights, so not all of them can be). What the evaluator does not model is said in every stage that it ran.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.export.budgets import PrecisionBudgets
from pocketvlm.export.mil import NAME, NOT_MODELLED, MilBackend, load_package
from pocketvlm.export.parity_stages import StageResult, judged, open_runtime, run_towers, stage_towers
from pocketvlm.export.reference_run import ReferenceRun

# smaller tensors (biases, norms, scalars) match by chance or are merged by every converter
SMALLEST_WEIGHT = 256
# a float16 copy keeps values to 2^-11; 8-bit and palettised weights to about a hundredth of their span
_NORM_TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3}
_COARSE = 2e-2
# the outermost value of a palette is a mean of its cluster, and the largest weight lies beyond it
_PALETTE_SPAN = 0.5
_INT32, _FLOATS = 131104, (65552, 65568, 65600)


def check_structure(bundle: Bundle, variant: BundleVariant, reference: ReferenceRun) -> dict[str, Any]:
    """tower -> what was found in its package.

    Raises:
        MissingExtraError: coremltools is not installed.
        IntegrityError: a package cannot be read or is not what the contract says.
    """
    details = {}
    for tower in ("image", "text"):
        if tower not in variant.files:
            raise IntegrityError(f"the Core ML {variant.precision} variant has no {tower} tower; export it again")
        details[tower] = _tower(bundle.path(variant.files[tower]), tower, bundle, variant, reference)
    return details


def stage_evaluated(
    stage: str,
    held: list[Any],
    bundle: Bundle,
    variant: BundleVariant,
    reference: ReferenceRun,
    budgets: PrecisionBudgets,
) -> StageResult:
    """S2 or S3 of a Core ML variant: its structure, then its towers by `coreml-mil`. held: takes the outputs.

    Raises:
        MissingExtraError, IntegrityError: see `check_structure`.
        UsageError: an operation that the evaluator does not know.
    """
    structure = check_structure(bundle, variant, reference)
    backend = open_runtime(bundle, variant)
    assert isinstance(backend, MilBackend), "what runs Core ML files here"
    outputs = run_towers(backend, reference)
    held.append(outputs)
    numbers = stage_towers(stage, bundle, outputs, variant, reference, budgets)
    found = ", ".join(f"{t} {d['weights_found']} of {d['weights']} weight tensors found" for t, d in structure.items())
    details = numbers.details | {"runtime": NAME, "not_modelled": NOT_MODELLED, "structure": structure}
    good = f"{numbers.message} by {NAME}, which does not model {NOT_MODELLED}; {found}"
    result = judged(stage, numbers.checks, details, good)
    if backend.overflow:
        result.message += "; " + "; ".join(f"{tower}: {said}" for tower, said in backend.overflow.items())
    return result


def _tower(path: Path, tower: str, bundle: Bundle, variant: BundleVariant, reference: ReferenceRun) -> dict[str, Any]:
    spec, program = load_package(path)
    details = {
        "specification": spec.specificationVersion,
        "inputs": [_input(entry, tower, path, bundle) for entry in spec.description.input],
        "outputs": [entry.name for entry in spec.description.output],
    }
    if len(details["inputs"]) != 1 or len(details["outputs"]) != 1:
        raise IntegrityError(
            f"{path.name} has inputs {details['inputs']} and outputs {details['outputs']}, a tower has one of each; "
            "applications would feed it wrongly, so export it again"
        )
    function = next(iter(program.functions.values()))
    shape = [value if isinstance(value, int) else str(value) for value in function.outputs[0].shape]
    dim = variant.dim or bundle.contract.embed_dim
    if not shape or shape[-1] != dim:
        raise IntegrityError(f"{path.name} gives embeddings of shape {shape}, the contract promises width {dim}")
    constants = _constants(function)
    bad = _non_finite(function, constants)
    if bad:
        raise IntegrityError(
            f"{path.name} stores NaN or Inf in {len(bad)} constants (first {bad[0]!r}); export it again"
        )
    expected = _weights(reference, tower)
    tolerance = _NORM_TOLERANCE.get(variant.precision, _COARSE)
    ends = _PALETTE_SPAN if variant.precision.startswith("palette") else tolerance
    found = _recognised(expected, constants, tolerance, ends)
    if not found:
        raise IntegrityError(
            f"{path.name} holds none of the {len(expected)} recorded {tower} weights; it was converted from another "
            "model or before the weights were loaded, so export it again"
        )
    return details | {
        "output_shape": shape,
        "operations": sum(1 for _ in _walk(function)),
        "constants": len(constants),
        "weights": len(expected),
        "weights_found": len(found),
        "weights_not_found": sorted(set(expected) - set(found))[:10],
    }


def _input(entry: Any, tower: str, path: Path, bundle: Bundle) -> str:
    """Name and type of an input, refused where it does not fit the contract."""
    contract, kind = bundle.contract, entry.type.WhichOneof("Type")
    # S0 and S1 came before
    assert contract.image is not None
    assert contract.text is not None
    size = contract.image.size
    if tower == "image" and kind == "imageType":
        found = (entry.type.imageType.height, entry.type.imageType.width)
        if found != (size, size):
            raise IntegrityError(f"{path.name} takes pictures of {found}, the contract says {size}; export it again")
        return f"{entry.name}: image {size} x {size}"
    if kind != "multiArrayType":
        raise IntegrityError(f"input {entry.name!r} of {path.name} is a {kind}, which no backend of this kit feeds")
    array = entry.type.multiArrayType
    shape = list(array.shape)
    wanted = [size, size, 3] if tower == "image" else [contract.text.context_length]
    types = (_INT32, *_FLOATS) if tower == "image" else (_INT32,)
    if shape[1:] != wanted or array.dataType not in types:
        raise IntegrityError(
            f"input {entry.name!r} of {path.name} has shape {shape} and type {array.dataType}, expected [batch, "
            f"{', '.join(map(str, wanted))}] and one of {types}; applications would feed it wrongly, so export it again"
        )
    return f"{entry.name}: {shape} of type {array.dataType}"


def _walk(function: Any) -> Any:
    for operation in function.operations:
        yield operation
        for block in operation.blocks:
            yield from _walk(block)


def _constants(function: Any) -> dict[str, NDArray[Any]]:
    """Every constant of the program, compressed ones expanded."""
    result: dict[str, NDArray[Any]] = {}
    for operation in _walk(function):
        value = None
        if operation.op_type == "const":
            value = operation.outputs[0].val
        elif operation.op_type.startswith("constexpr"):
            value = operation.materialized_val_inference()
        if value is not None and np.asarray(value).dtype.kind in "fiu":
            result[operation.name] = np.asarray(value)
    return result


def _non_finite(function: Any, constants: dict[str, NDArray[Any]]) -> list[str]:
    """Constants with NaN or Inf; an infinite bound of a clip is how "no upper limit" is written, and is fine."""
    bounds = {
        operation.name
        for operation in _walk(function)
        if operation.op_type == "const"
        and np.ndim(operation.outputs[0].val) == 0
        and operation.outputs[0].child_ops
        and all(child.op_type == "clip" for child in operation.outputs[0].child_ops)
    }
    return [
        name
        for name, value in constants.items()
        if value.dtype.kind == "f" and not np.isfinite(value).all() and (name not in bounds or np.isnan(value).any())
    ]


def _weights(reference: ReferenceRun, tower: str) -> dict[str, dict[str, Any]]:
    return {
        name: entry
        for name, entry in reference.weights.items()
        if name.startswith(f"{tower}_tower.")
        and len(entry["shape"]) > 1
        and int(np.prod(entry["shape"])) >= SMALLEST_WEIGHT
    }


def _recognised(
    expected: dict[str, dict[str, Any]], constants: dict[str, NDArray[Any]], tolerance: float, ends: float
) -> list[str]:
    """Recorded weights with a constant of the same size, norm and extremes (a converter may transpose: all stay).

    tolerance: of the norm, relative. ends: of the extremes, relative to the largest magnitude.
    """
    stored: dict[int, list[tuple[float, float, float]]] = {}
    for value in constants.values():
        if value.dtype.kind == "f" and value.size >= SMALLEST_WEIGHT:
            wide = value.astype(np.float64)
            facts = (float(np.linalg.norm(wide)), float(wide.min()), float(wide.max()))
            stored.setdefault(value.size, []).append(facts)

    def same(entry: dict[str, Any], facts: tuple[float, float, float]) -> bool:
        norm, low, high = facts
        span = max(abs(entry["min"]), abs(entry["max"]))
        return (
            abs(norm - entry["norm"]) <= tolerance * entry["norm"]
            and abs(low - entry["min"]) <= ends * span
            and abs(high - entry["max"]) <= ends * span
        )

    return [
        name
        for name, entry in expected.items()
        if any(same(entry, facts) for facts in stored.get(int(np.prod(entry["shape"])), []))
    ]
