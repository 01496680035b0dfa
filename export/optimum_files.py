"""ONNX files that Hugging Face optimum wrote, as a bundle of ours: `EdgeModel`, parity and bench work on them.

optimum exports CLIP and SigLIP as one graph of normalised planes, ids and an attention mask to both embeddings and
their logits. Each tower is cut out of it unchanged, gets the contract's inputs (uint8 pixels, int32 ids) in front and
a normalisation behind, and is held against the model that it was exported from before the bundle appears:
`export_bundle("hf:FOLDER", out, [OptimumFiles(folder)])`. Contract, tokenizer, logit scale and licences are the
model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import IntegrityError, UsageError, require
from pocketvlm.export.mixed import Plan
from pocketvlm.export.onnx_weights import weight_scales
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant
from pocketvlm.export.targets.onnx import INPUTS, OUTPUT, Tower, stamp

_EMBEDS: dict[Tower, str] = {"image": "image_embeds", "text": "text_embeds"}
_TAKES: dict[Tower, tuple[str, ...]] = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM"}
_STATIC = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "QLinearAdd"}


class OptimumFiles:
    """A `Target` that takes the .onnx files of one folder as they are instead of lowering anything.

    The precision of a file is read from its operators: dynamic or static int8, 4-bit blocks, int8 weights alone,
    float16, float32. Weights with one scale for a whole tensor are the choice of who made the file and are noted as
    such (`notes["weights"]` is "per-tensor"), so that parity judges the answers and not the choice.

    Raises:
        UsageError: no file with the embeddings of a CLIP or SigLIP, or two of one precision and tower.
        MissingExtraError: the onnx package is not installed.
    """

    name: ClassVar[str] = "onnx"
    refused: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: str | Path) -> None:
        self._onnx = require("onnx", "onnx")
        self._files: dict[str, dict[Tower, Path]] = {}
        paths = sorted(Path(folder).glob("*.onnx"))
        for path in paths:
            self._sort_in(path)
        lacking = {p: [t for t in _EMBEDS if t not in towers] for p, towers in self._files.items()}
        if not self._files:
            raise UsageError(
                f"{str(folder)!r} has {len(paths)} .onnx files and none with an output image_embeds or text_embeds; "
                "there is no tower to take, so give the folder that 'optimum-cli export onnx --task "
                "zero-shot-image-classification' wrote"
            )
        for precision, towers in lacking.items():
            if towers:
                raise UsageError(
                    f"the {precision} files in {str(folder)!r} lack the {towers[0]} tower; a bundle needs both at one "
                    "precision, so export or quantize the other too"
                )
        self.precisions: tuple[str, ...] = tuple(self._files)
        self.defaults: tuple[str, ...] = self.precisions

    def _sort_in(self, path: Path) -> None:
        model = self._onnx.load(str(path), load_external_data=False)
        outputs = {entry.name for entry in model.graph.output}
        for tower, output in _EMBEDS.items():
            if output not in outputs:
                continue
            known = self._files.setdefault(precision_of(model), {})
            if tower in known:
                raise UsageError(
                    f"{known[tower].name} and {path.name} are both {precision_of(model)} and have a {tower} tower; one "
                    "would hide the other, so move one of them to a folder of its own"
                )
            known[tower] = path

    def lower(
        self,
        towers: Towers,
        *,
        precision: Precision,
        folder: Path,
        calibration: Calibration | None,
        plan: Plan | None = None,
    ) -> Variant:
        """Write both towers of this precision.

        Raises:
            UsageError: inputs that the contract cannot feed. IntegrityError: another size than the contract's.
        """
        files: dict[str, str] = {}
        notes: dict[str, object] = {
            "made_by": "optimum",
            "from": sorted({p.name for p in self._files[precision].values()}),
        }
        whole = False
        for tower, path in self._files[precision].items():
            files[tower] = f"{self.name}/{tower}-{precision}.onnx"
            target = folder / files[tower]
            target.parent.mkdir(parents=True, exist_ok=True)
            model = self._tower(self._onnx.load(str(path)), tower, towers.contract)
            stamp(model, tower, precision, towers.contract.digest())
            self._onnx.save(model, str(target))
            whole = whole or bool(weight_scales(target)[1])
        if whole:
            notes["weights"] = "per-tensor"
        return Variant(self.name, precision, files, "dynamic", towers.contract.embed_dim, notes)

    def _tower(self, model: Any, tower: Tower, contract: ModelContract) -> Any:
        graph = model.graph
        _cut_out(graph, _EMBEDS[tower])
        self._check_inputs(graph, tower, contract)
        helper, kind = self._onnx.helper, self._onnx.TensorProto
        spec = contract.image if tower == "image" else None
        given = [entry.name for entry in graph.input]
        if spec is not None:
            shift, spread = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (spec.mean, spec.std))
            constants = {"pv_255": np.float32(255), "pv_mean": shift, "pv_std": spread}
            front = [
                helper.make_node("Transpose", [INPUTS[tower]], ["pv_planes"], perm=[0, 3, 1, 2]),
                helper.make_node("Cast", ["pv_planes"], ["pv_float"], to=kind.FLOAT),
                helper.make_node("Div", ["pv_float", "pv_255"], ["pv_unit"]),
                helper.make_node("Sub", ["pv_unit", "pv_mean"], ["pv_centred"]),
                helper.make_node("Div", ["pv_centred", "pv_std"], ["pv_ready"]),
                helper.make_node("Cast", ["pv_ready"], ["pixel_values"], to=graph.input[0].type.tensor_type.elem_type),
            ]
            entry = helper.make_tensor_value_info(INPUTS[tower], kind.UINT8, ["batch", spec.size, spec.size, 3])
        else:
            assert contract.text is not None, "a dual contract has a text spec"
            constants = {"pv_one": np.int64(1), "pv_zero": np.int64(0)}
            front = [helper.make_node("Cast", [INPUTS[tower]], ["input_ids"], to=kind.INT64)]
            if "attention_mask" in given:
                # nothing is hidden, as where this kit cuts a causal text tower out: what follows the closing token,
                # which alone is read, cannot reach it
                front.append(helper.make_node("Mul", ["input_ids", "pv_zero"], ["pv_zeros"]))
                front.append(helper.make_node("Add", ["pv_zeros", "pv_one"], ["attention_mask"]))
            entry = helper.make_tensor_value_info(INPUTS[tower], kind.INT32, ["batch", contract.text.context_length])
        back = [
            helper.make_node("Cast", [_EMBEDS[tower]], ["pv_out"], to=kind.FLOAT),
            helper.make_node("Mul", ["pv_out", "pv_out"], ["pv_squares"]),
            helper.make_node("ReduceSum", ["pv_squares", "pv_axis"], ["pv_sum"], keepdims=1),
            helper.make_node("Sqrt", ["pv_sum"], ["pv_norm"]),
            helper.make_node("Max", ["pv_norm", "pv_least"], ["pv_length"]),
            helper.make_node("Div", ["pv_out", "pv_length"], [OUTPUT]),
        ]
        constants |= {"pv_axis": np.array([-1], np.int64), "pv_least": np.float32(1e-12)}
        for name, value in constants.items():
            graph.initializer.append(self._onnx.numpy_helper.from_array(np.asarray(value), name))
        nodes = [*front, *graph.node, *back]
        del graph.node[:], graph.input[:], graph.output[:]
        graph.node.extend(nodes)
        graph.input.append(entry)
        graph.output.append(helper.make_tensor_value_info(OUTPUT, kind.FLOAT, ["batch", contract.embed_dim]))
        self._onnx.checker.check_model(model)
        return model

    def _check_inputs(self, graph: Any, tower: Tower, contract: ModelContract) -> None:
        for entry in graph.input:
            if entry.name not in _TAKES[tower]:
                raise UsageError(
                    f"the {tower} tower takes an input {entry.name!r}, and a contract feeds pixels and ids only; "
                    f"nothing would give it, so export the model without it ({', '.join(_TAKES[tower])})"
                )
        taken = {entry.name: entry for entry in graph.input}
        if _TAKES[tower][0] not in taken:
            raise UsageError(
                f"the {tower} tower does not depend on {_TAKES[tower][0]!r}; every input would give one answer, so "
                "export the model again"
            )
        shape = [size.dim_value for size in taken[_TAKES[tower][0]].type.tensor_type.shape.dim]
        size = contract.image.size if contract.image else 0
        length = contract.text.context_length if contract.text else 0
        wanted = [0, 3, size, size] if tower == "image" else [0, length]
        if shape[0] or any(found not in (0, asked) for found, asked in zip(shape[1:], wanted[1:])):
            raise IntegrityError(
                f"{_TAKES[tower][0]!r} of the {tower} tower has the fixed shape {shape} (0: free) and the contract "
                f"says {wanted}; the graph belongs to another model or was exported for one batch, so export it again"
            )


def precision_of(model: Any) -> str:
    """The name of our vocabulary for how an ONNX model is quantized, by its operators and constants."""
    operators = {node.op_type for node in model.graph.node}
    if "MatMulNBits" in operators:
        return "w4"
    if operators & _DYNAMIC:
        return "w8a8-dynamic"
    if operators & _STATIC:
        return "w8a8-static"
    if "DequantizeLinear" in operators:
        return "w8"
    # FLOAT16 is 10: its tensors outweigh the few that stay in float32
    halves = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == 10)
    singles = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == 1)
    return "fp16" if halves > singles else "fp32"


def _cut_out(graph: Any, output: str) -> None:
    """Keep what `output` needs, in place: nodes in their order, constants and inputs."""
    needed, kept = {output}, []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(_reads(node))
    for field, entries in (
        ("node", kept[::-1]),
        *((f, _named(getattr(graph, f), needed)) for f in ("initializer", "input")),
    ):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(entries)
    # an input of an old file may be a constant's default
    constants = {entry.name for entry in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)
    del graph.value_info[:]


def _named(entries: Iterable[Any], names: set[str]) -> list[Any]:
    return [entry for entry in entries if entry.name in names]


def _reads(node: Any) -> Sequence[str]:
    """Names that a node reads, those of graphs inside it included."""
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    inside = [name for graph in inner for step in graph.node for name in _reads(step)]
    inside += [entry.name for graph in inner for entry in graph.output]
    return [*node.input, *inside]
