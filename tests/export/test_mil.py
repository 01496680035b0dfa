"""The evaluator of Core ML programs: each operation against torch, planted faults, compressed weights, the disk."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.export.mil import program, windows
from pocketvlm.export.mil.ops import OPERATIONS, Arguments


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mil_cases, toy = _load("mil_cases"), _load("mil_toy")

# --- operation by operation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
@pytest.mark.parametrize("name", mil_cases.MAKERS)
def test_an_operation_agrees_with_torch(name: str, kind: str) -> None:
    for seed in range(6):
        rng = toy.np.random.default_rng([seed, *name.encode()])
        case = mil_cases.MAKERS[name](rng)
        assert not toy.faults(case, kind), f"seed {seed}: {case}"


def test_every_operation_has_a_case() -> None:
    assert {case.operation for case in mil_cases.cases(seeds=1)} == set(OPERATIONS)


def _changed(name: str, **changes: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
    """The operation, given other arguments than the program's."""
    honest = OPERATIONS[name]

    def wrong(a: Arguments) -> Any:
        return honest(Arguments({**a._values, **{key: change(a) for key, change in changes.items()}}))

    return wrong


def _transposed(a: Arguments) -> torch.Tensor:
    weight = a.tensor("weight")
    return weight.mT if weight.shape[0] == weight.shape[1] else weight


FAULTS: dict[str, tuple[str, Callable[[Arguments], Any]]] = {
    "padding on the other side": ("conv", _changed("conv", pad=lambda a: a.ints("pad", [0] * 4)[::-1])),
    "same for same_lower": (
        "conv",
        _changed("conv", pad_type=lambda a: a.text("pad_type", "").replace("same_lower", "same")),
    ),
    "kernel flipped": ("conv", _changed("conv", weight=lambda a: a.tensor("weight").flip(-1))),
    "dilation forgotten": ("conv", _changed("conv", dilations=lambda a: [1] * 2, pad_type=lambda a: "valid")),
    "bias forgotten": ("conv", _changed("conv", bias=lambda a: None)),
    "transposed weight": ("linear", _changed("linear", weight=_transposed)),
    "transpose_y ignored": ("matmul", _changed("matmul", transpose_y=lambda a: False)),
    "gelu by tanh": ("gelu", _changed("gelu", mode=lambda a: "TANH_APPROXIMATION")),
    "layer_norm eps": ("layer_norm", _changed("layer_norm", epsilon=lambda a: 1e-5)),
    "layer_norm over the last axis only": (
        "layer_norm",
        lambda a: F.layer_norm(
            a.tensor(), a.tensor().shape[-1:], a.tensor("gamma"), a.tensor("beta"), a.number("epsilon", 0)
        ),
    ),
    "batch_norm eps": ("batch_norm", _changed("batch_norm", epsilon=lambda a: 1e-5)),
    "batch_norm without gamma": ("batch_norm", _changed("batch_norm", gamma=lambda a: None)),
    "softmax over the last axis": ("softmax", _changed("softmax", axis=lambda a: -1)),
    "concat along the first axis": ("concat", _changed("concat", axis=lambda a: 0)),
    "not interleaved": ("concat", _changed("concat", interleave=lambda a: False)),
    "mean over the first axis": ("reduce_mean", _changed("reduce_mean", axes=lambda a: [0])),
    "keep_dims forgotten": ("reduce_l2_norm", _changed("reduce_l2_norm", keep_dims=lambda a: False)),
    "argmax over the last axis": ("reduce_argmax", _changed("reduce_argmax", axis=lambda a: -1)),
    "perm inverted": (
        "transpose",
        _changed("transpose", perm=lambda a: torch.argsort(torch.tensor(a.ints("perm")))),
    ),
    "rows repeated instead of tiled": (
        "tile",
        lambda a: a.tensor().repeat_interleave(a.ints("reps")[0], 0).repeat([1, *a.ints("reps")[1:]]),
    ),
    "split sizes reversed": ("split", _changed("split", split_sizes=lambda a: a.ints("split_sizes", [2] * 3)[::-1])),
    "edge for reflection": (
        "pad",
        _changed("pad", mode=lambda a: a.text("mode", "").replace("reflect", "replicate")),
    ),
    "pad pairs swapped": ("pad", _changed("pad", pad=lambda a: a.ints("pad")[::-1])),
    "stride ignored": ("slice_by_index", _changed("slice_by_index", stride=lambda a: None)),
    "end mask ignored": ("slice_by_index", _changed("slice_by_index", end_mask=lambda a: None)),
    "gather along the first axis": ("gather", _changed("gather", axis=lambda a: 0)),
    "padding counted in a mean": (
        "avg_pool",
        _changed("avg_pool", exclude_padding_from_average=lambda a: False),
    ),
    "ceil_mode forgotten": ("max_pool", _changed("max_pool", ceil_mode=lambda a: False)),
    "padded with zeros": ("max_pool", lambda a: windows._windows(a, 0.0)[0].amax(-1)),
    "scores not scaled": (
        "scaled_dot_product_attention",
        _changed(
            "scaled_dot_product_attention", query=lambda a: a.tensor("query") * a.tensor("query").shape[-1] ** 0.5
        ),
    ),
    "mask forgotten": (
        "scaled_dot_product_attention",
        _changed("scaled_dot_product_attention", attn_mask=lambda a: None),
    ),
    "branches swapped": ("select", _changed("select", a=lambda a: a.tensor("b"), b=lambda a: a.tensor("a"))),
    "zero point forgotten": ("quantize", _changed("quantize", zero_point=lambda a: None)),
    "halves rounded up": (
        "quantize",
        _changed("quantize", input=lambda a: a.tensor("input") + 1e-4),
    ),
    "unsigned for signed": ("quantize", _changed("quantize", output_dtype=lambda a: "uint8")),
    "scale along the other axis": (
        "dequantize",
        _changed("dequantize", axis=lambda a: (a.integer("axis") + 1) % a.tensor("input").ndim),
    ),
    "clipped from below only": ("clip", _changed("clip", beta=lambda a: float("inf"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, wrong = FAULTS[fault]
    same = list(mil_cases.cases(operation, seeds=30))
    assert not any(toy.faults(case, "fp32") for case in same)
    monkeypatch.setitem(OPERATIONS, operation, wrong)
    assert any(_caught(case) for case in same), f"none of {len(same)} cases shows {fault!r}"


def _caught(case: Any) -> bool:
    try:
        return bool(toy.faults(case, "fp32"))
    except IntegrityError:  # another shape than the package declares, or none at all
        return True


def test_results_that_are_not_rounded_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mil_cases.MAKERS["softmax"](toy.np.random.default_rng(0))
    monkeypatch.setattr(program, "stored", lambda value, kind: value.float())
    assert toy.faults(case, "fp16") == "values that float16 does not have"


def test_roundings_that_add_up_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mil_cases.MAKERS["softmax"](toy.np.random.default_rng(0))
    honest = OPERATIONS["softmax"]
    monkeypatch.setitem(OPERATIONS, "softmax", lambda a: honest(Arguments({**a._values, "x": a.tensor() * 1.002})))
    assert "times the rounding" in toy.faults(case, "fp16")


# --- programs -------------------------------------------------------------------------------------------------------


def _conv_program() -> Any:
    case = mil_cases.MAKERS["conv"](toy.np.random.default_rng(0))
    built, feeds = toy.build(case, "fp32")
    return built.functions["main"], feeds


def test_an_unknown_operation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    function, _ = _conv_program()
    monkeypatch.delitem(OPERATIONS, "conv")
    with pytest.raises(
        UsageError, match=r"image\.mlpackage has the operation 'conv' \(output 'conv_\d+'\), which"
    ) as e:
        program.MilProgram(function, "image.mlpackage")
    assert "conformance/coreml_predict.py on a Mac" in str(e.value)


def test_other_inputs_are_refused() -> None:
    function, feeds = _conv_program()
    with pytest.raises(UsageError, match=r"takes the inputs \['x'\] and \['y'\] were given"):
        program.MilProgram(function).run({"y": feeds["x"]})


def test_what_cannot_be_computed_is_named() -> None:
    function, feeds = _conv_program()
    with pytest.raises(
        IntegrityError, match=r"operation 'conv' of the program \(output 'conv_\d+'\) cannot be carried"
    ):
        program.MilProgram(function).run({"x": feeds["x"][:, :1]})


def test_an_index_past_the_table_is_refused() -> None:
    case = mil_cases.MAKERS["gather"](toy.np.random.default_rng(0))
    built, feeds = toy.build(case, "fp32")
    evaluator = program.MilProgram(built.functions["main"])
    for wrong in (99, -1):  # from iOS 17 on, -1 is out of bounds too
        with pytest.raises(IntegrityError, match="operation 'gather'"):
            evaluator.run(feeds | {"indices": toy.np.full_like(feeds["indices"], wrong)})


def test_float16_overflows_and_the_operation_is_named() -> None:
    case = mil_cases.MAKERS["square"](toy.np.random.default_rng(0))
    case.inputs["x"] = toy.np.full((2, 3), 300.0)
    for kind, finite in (("fp32", True), ("fp16", False)):
        built, feeds = toy.build(case, kind)
        evaluator = program.MilProgram(built.functions["main"])
        found = evaluator.run(feeds)[evaluator.outputs[0]]
        assert bool(torch.isfinite(found).all()) == finite
        said = program.first_overflow(evaluator, feeds)
        assert said.startswith("square 'square_") if not finite else not said


# --- from torch, through the disk -----------------------------------------------------------------------------------


class _Everything(torch.nn.Module):
    """One module with many answers, so that one conversion checks many operations against torch's own meaning."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        nn = torch.nn
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=(2, 1), dilation=(2, 1), groups=8)
        self.back = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
        self.layer, self.wide, self.table = nn.LayerNorm(8, eps=1e-3), nn.Linear(8, 24), nn.Embedding(9, 8)
        for value in [*self.parameters(), self.norm.running_mean, self.norm.running_var]:
            with torch.no_grad():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator).abs() + 0.1)

    def forward(self, planes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.norm(self.conv(planes))
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.wide(self.layer(tokens)).reshape(1, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        ids = x.mean((2, 3)).argmax(-1, keepdim=True) % 9
        return (
            F.relu6(self.depth(x)), self.back(x), attended, F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x),
            F.hardswish(x), F.max_pool2d(x, 3, 2, 1, ceil_mode=True), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            F.adaptive_avg_pool2d(x, 1).flatten(1), F.normalize(tokens, dim=-1), self.table(ids),
            F.pad(x, (1, 2, 0, 1), mode="reflect"), x[:, ::2, 1:-1, -3:], torch.cat([x, -x], 1).cumsum(1),
            torch.stack([x.amax(1), x.mean((1,))]), torch.where(x > 0.5, x, 0.25 + x / 2), x.chunk(4, 1)[2],
            tokens.logsumexp(-1), torch.einsum("bnc,bmc->bnm", tokens, tokens),
        )  # fmt: skip


def _saved(tmp_path: Path, target: str, precision: str) -> tuple[Any, Any, torch.nn.Module]:
    """(evaluator, declared input, module) of `_Everything` with a scaled BGR image input, through the disk."""
    ct = toy.ct
    module = _Everything().eval()
    image = ct.ImageType("pixels", shape=(1, 3, 15, 13), scale=1 / 127.5, bias=[-1.0, -0.9, -1.1], color_layout="BGR")
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.rand(1, 3, 15, 13), check_trace=False)
    ct.convert(
        traced, inputs=[image], convert_to="mlprogram", minimum_deployment_target=getattr(ct.target, target),
        compute_precision=getattr(ct.precision, precision), skip_model_load=True,
    ).save(str(tmp_path / "all.mlpackage"))  # fmt: skip
    spec, loaded = program.load_package(tmp_path / "all.mlpackage")
    return program.MilProgram(loaded.functions["main"], "all"), spec.description.input[0], module


@pytest.mark.parametrize(
    ("target", "precision", "floor"),
    [("iOS17", "FLOAT32", 100.0), ("iOS18", "FLOAT32", 100.0), ("iOS18", "FLOAT16", 45.0)],
)
def test_a_converted_module_computes_what_torch_computes(
    target: str, precision: str, floor: float, tmp_path: Path
) -> None:
    evaluator, entry, module = _saved(tmp_path, target, precision)
    rows = toy.np.random.default_rng(0).integers(0, 256, (1, 15, 13, 3), dtype=toy.np.uint8)
    # Core ML's bias is added after the scale, in the order of the planes
    bgr = torch.from_numpy(rows[..., ::-1].transpose(0, 3, 1, 2).copy()).double()
    with torch.no_grad():
        right = module.double()(bgr / 127.5 + torch.tensor([-1.0, -0.9, -1.1]).double().reshape(1, 3, 1, 1))
    outputs = evaluator.run({"pixels": program.as_input(entry, rows)})
    assert len(right) == len(evaluator.outputs)
    for i, (name, expected) in enumerate(zip(evaluator.outputs, right)):
        assert toy.decibel(expected, outputs[name]) >= floor, f"answer {i}"
    assert ("scaled_dot_product_attention" in evaluator.operations) == (target == "iOS18")


# --- compressed weights ---------------------------------------------------------------------------------------------


class _Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.linear = torch.nn.Conv2d(8, 32, 3, bias=False), torch.nn.Linear(32, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


def _expanded(operation: Any) -> Any:
    """A constexpr operation's weights, written out from its stored fields."""
    np, kind = toy.np, operation.op_type
    fields = {
        name: value.val if value.val is not None else _expanded(value.op)
        for name, value in operation.inputs.items()
        if value is not None
    }
    if kind == "constexpr_affine_dequantize":
        along = [-1 if i == fields["axis"] else 1 for i in range(fields["quantized_data"].ndim)]
        scale, zero = (np.asarray(fields[n], np.float64) for n in ("scale", "zero_point"))
        scale, zero = (v.reshape(along) if v.ndim else v for v in (scale, zero))
        return (fields["quantized_data"].astype(np.float64) - zero) * scale
    if kind == "constexpr_lut_to_dense" and "shape" in fields:  # iOS 16: bits one after another, lowest first
        bits = np.unpackbits(fields["indices"], bitorder="little")
        width, count = int(np.log2(len(fields["lut"]))), int(np.prod(fields["shape"]))
        indices = bits[: width * count].reshape(count, width) @ (1 << np.arange(width))
        return fields["lut"][indices].reshape(fields["shape"])
    if kind == "constexpr_lut_to_dense":  # iOS 18: one table for each block, its last two axes are entries and vectors
        indices, lut = np.asarray(fields["indices"]).astype(int), fields["lut"]
        blocks = np.array(indices.shape) // np.array(lut.shape[: indices.ndim])
        dense = np.empty(indices.shape)
        for at in np.ndindex(*indices.shape):
            dense[at] = lut[(*(np.array(at) // blocks), indices[at], 0)]
        return dense
    if kind == "constexpr_blockwise_shift_scale":
        data, scale = np.asarray(fields["data"]).astype(np.float64), fields["scale"]
        blocks, dense = np.array(data.shape) // np.array(scale.shape), np.empty(data.shape)
        for at in np.ndindex(*data.shape):
            block = tuple(np.array(at) // blocks)
            dense[at] = (data[at] - float(fields.get("offset", np.zeros(scale.shape))[block])) * scale[block]
        return dense
    assert kind == "constexpr_sparse_to_dense"
    if "shape" in fields:
        mask = np.unpackbits(fields["mask"], bitorder="little")[: int(np.prod(fields["shape"]))]
        mask = mask.reshape(fields["shape"])
    else:
        mask = np.asarray(fields["mask"]).astype(int)
    dense = np.zeros(mask.shape)
    dense[mask == 1] = fields["nonzero_data"]
    return dense


def _compressed(kind: str) -> tuple[str, Callable[[Any, Any], Any]]:
    import coremltools.optimize.coreml as cto

    def config(made: Any) -> Any:
        return cto.OptimizationConfig(global_config=made)

    linear, palette = cto.OpLinearQuantizerConfig, cto.OpPalettizerConfig
    return {
        "int8": (
            "iOS17",
            lambda m, _: cto.linear_quantize_weights(m, config(linear(dtype="int8", weight_threshold=0))),
        ),
        "uint8": (
            "iOS17",
            lambda m, _: cto.linear_quantize_weights(
                m, config(linear(mode="linear", dtype="uint8", weight_threshold=0))
            ),
        ),
        "palette of 16": (
            "iOS17",
            lambda m, _: cto.palettize_weights(m, config(palette(mode="uniform", nbits=4, weight_threshold=0))),
        ),
        "sparse": (
            "iOS17",
            lambda m, _: cto.prune_weights(
                m, config(cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0))
            ),
        ),
        "int4 in blocks": (
            "iOS18",
            lambda m, _: cto.linear_quantize_weights(
                m, config(linear(dtype="int4", granularity="per_block", block_size=8, weight_threshold=0))
            ),
        ),
        "palettes of channels": (
            "iOS18",
            lambda m, _: cto.palettize_weights(
                m,
                config(
                    palette(
                        mode="uniform", nbits=3, granularity="per_grouped_channel", group_size=8, weight_threshold=0
                    )
                ),
            ),
        ),
    }[kind]


@pytest.mark.parametrize("kind", ["int8", "uint8", "palette of 16", "sparse", "int4 in blocks", "palettes of channels"])
def test_compressed_weights_are_those_of_their_fields(kind: str, tmp_path: Path) -> None:
    ct, (target, compress) = toy.ct, _compressed(kind)
    module = _Weights().eval()
    x = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model = ct.convert(
            torch.jit.trace(module, x), inputs=[ct.TensorType("x", shape=x.shape)], convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target), compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )  # fmt: skip
    compress(model, None).save(str(tmp_path / "small.mlpackage"))
    _, loaded = program.load_package(tmp_path / "small.mlpackage")
    function = loaded.functions["main"]
    weights = {
        op.outputs[0].shape: _expanded(op)
        for op in function.operations
        if op.op_type.startswith("constexpr_")
        and len(op.outputs[0].shape) > 1
        and op.outputs[0].child_ops[0].op_type in ("conv", "linear")
    }
    assert set(weights) == {(32, 8, 3, 3), (64, 32)}, [op.op_type for op in function.operations]
    lossy = module.double()
    plain = lossy(x.double())
    with torch.no_grad():
        for layer in (lossy.conv, lossy.linear):
            layer.weight.copy_(torch.from_numpy(toy.np.asarray(weights[tuple(layer.weight.shape)], toy.np.float64)))
        right = lossy(x.double())
    evaluator = program.MilProgram(function)
    found = evaluator.run({"x": x})[evaluator.outputs[0]]
    assert toy.decibel(right, found) >= toy.FLOOR_DB
    # and it is the compression that is measured, not the weights that went in
    assert 3 < toy.decibel(plain.detach(), found) < 60
