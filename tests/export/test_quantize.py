"""Sensitivity of blocks, the search for the fewest in float, and the command that makes files of them."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm import cli
from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.data.source import DataSource
from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.export.calibration import build_calibration
from pocketvlm.export.compare import paired_change
from pocketvlm.export.fidelity import run_module
from pocketvlm.export.graphs import blocks_of
from pocketvlm.export.mixed import load_plan
from pocketvlm.export.prepare import Prepared
from pocketvlm.export.quantize import Quantized, front, quantize, search
from pocketvlm.export.quantize_points import Goal, Judge, Point, make_judge, parse_goal
from pocketvlm.export.quantize_report import table
from pocketvlm.export.sensitivity import Damage, alone, measure_blocks
from pocketvlm.export.source import Exportable
from pocketvlm.export.static import Settings
from pocketvlm.export.targets.base import Towers
from pocketvlm.export.validation import Validation, build_validation, changes, margins, ranks
from pocketvlm.students import train_tokenizer

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_data(count: int = 330) -> DataSource:
    samples = []
    for index, pixels in enumerate(toy.pictures(count, 11)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        words = f"a {['red', 'green', 'blue'][index % 3]} {['bar', 'circle'][index % 2]} {index}"
        samples.append(Sample(f"toy/{index}", ImageRef(data=buffer.getvalue()), (Caption(words),)))
    return DataSource("toy", samples, licences=(("toy pictures", "CC0-1.0", "pocketvlm's tests"),))


@pytest.fixture(scope="module")
def model() -> Exportable:
    towers = toy.toy_towers()
    data = train_tokenizer(["red green blue circle bar a 0123456789"] * 3, 300)
    text = replace(towers.contract.text, tokenizer_sha256=hashlib.sha256(data).hexdigest())
    towers = replace(towers, contract=replace(towers.contract, text=text))
    return Exportable(towers, data, (("toy weights", "Apache-2.0", "nobody"),), {})


# --- each block alone -----------------------------------------------------------------------------------------------


def normalized(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def in_int8(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


def test_a_block_alone_is_that_block_rounded_and_everything_else_in_float() -> None:
    """The last layer by hand: features in float, rows and weights rounded, the mean put back."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(inplace=True), torch.nn.Linear(40, 8))
    tower = toy.nn.Sequential()
    tower.body = net
    rows = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    ready = Prepared(tower.eval(), rows)
    exact = run_module(tower, rows[:9])
    found = {
        block: (weights, macs, base, out) for block, weights, macs, base, out in alone(tower, ready, rows[:9], exact)
    }
    assert list(found) == ["body.0", "body.2"]
    weights, macs, base, out = found["body.2"]
    assert (weights, macs) == (320, 320)
    np.testing.assert_allclose(base, exact, atol=2e-6)
    graph = ready.balanced()
    (linear,) = [n for n in graph.graph.nodes if n.name == "linear_1"]
    weight = graph.get_parameter(str(linear.args[1].target)).detach().numpy().astype(np.float64)
    # what the balanced layer reads: its input in float, times the balance where there is one
    seen: dict[str, np.ndarray] = {}

    class Spy(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n is linear.args[0]:
                seen["x"] = value.detach().numpy().astype(np.float64).copy()
            return value

    def features(inputs: np.ndarray) -> np.ndarray:
        Spy(graph).run(torch.from_numpy(inputs))
        return seen["x"]

    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    rounded = np.round(weight / step) * step
    bias = net[2].bias.detach().numpy().astype(np.float64)

    def layer(x: np.ndarray) -> np.ndarray:
        return in_int8(x, x.min(1, keepdims=True), x.max(1, keepdims=True)) @ rounded.T + bias

    fit = features(ready.fit[:48])
    shift = (fit @ weight.T + bias).mean(0) - layer(fit).mean(0)
    np.testing.assert_allclose(out, layer(features(rows[:9])) + shift, atol=2e-4)
    assert np.abs(out - base).max() > 1e-3


def test_blocks_of_a_convolutional_tower_alone_leave_each_other_as_they_are(model: Exportable) -> None:
    """Values that operators write over, and sums that read what came before, are those of a clean run."""
    image = model.towers.image
    assert image is not None
    rows = toy.pictures(24, 5)
    ready = Prepared(image, toy.pictures(64, 100))
    exact = run_module(image, rows)
    found = list(alone(image, ready, rows, exact))
    assert [entry[0] for entry in found] == ["head.0", "projection"], "three convolutions are no block"
    for _, _, _, base, out in found:
        np.testing.assert_allclose(base, exact, atol=2e-6)
        error = 1 - (out * exact).sum(1).mean()
        assert 1e-7 < error < 1e-2


def test_a_planted_outlier_ranks_first(model: Exportable) -> None:
    towers = toy.toy_towers()
    with torch.no_grad():
        # a silent input channel with huge weights: float does not notice, and int8 has no steps left for the others
        for norm in (towers.image.stem[1], towers.image.point[1]):
            norm.weight[0] = norm.bias[0] = 0
        towers.image.head[0].weight[:, 0] *= 1000
    calibration, data = toy.toy_calibration(), toy.sentences(80, 3)
    positives = np.eye(80, dtype=bool)
    validation = Validation(toy.pictures(80, 3), data, positives, "toy")
    ready = {
        "image": (towers.image, Prepared(towers.image, calibration.pixels)),
        "text": (towers.text, Prepared(towers.text, calibration.ids)),
    }
    # as a search of ranges would keep that layer in float
    ready["image"][1].settings = Settings()
    found = measure_blocks(ready, validation)
    assert max((one for one in found), key=lambda one: one.margin_noise).name == "image head.0"
    assert {one.name for one in found} == {
        "image head.0", "image projection", "text token", "text qkv", "text out", "text projection",
    }  # fmt: skip
    assert [one.per_byte for one in found] == sorted((one.per_byte for one in found), reverse=True)
    (table_,) = [one for one in found if one.block == "token"]
    assert (table_.weights, table_.extra_bytes, table_.macs) == (toy.VOCAB * 32, 3 * toy.VOCAB * 32, 0)
    assert json.dumps(table_.to_dict())


def test_a_block_inside_a_block_counts_to_the_outer_one() -> None:
    paths = ["blocks.0.attn.qkv", "blocks.0.mlp.0.fc", "blocks.1.mlp.0.fc", "head"]
    assert blocks_of(paths) == ["blocks.0", "blocks.0", "blocks.1.mlp.0", "head"]


# --- the sample -----------------------------------------------------------------------------------------------------


def test_validation_pictures_do_not_calibrate(model: Exportable) -> None:
    data, tokenizer = make_data(150), model.tokenizer()
    assert tokenizer is not None
    calibration = build_calibration(data, model.towers.contract, tokenizer, size=64)
    validation = build_validation(data, model.towers.contract, tokenizer, calibration=64, size=500)
    seen = {row.tobytes() for row in calibration.pixels}
    assert len(validation.pixels) == 150 - 64
    assert not seen & {row.tobytes() for row in validation.pixels}
    assert validation.positives.sum() == len(validation.pixels)
    with pytest.raises(
        UsageError, match="toy has 22 captioned pictures beside the 128 that calibrate and 64 are needed"
    ):
        build_validation(data, model.towers.contract, tokenizer, calibration=128)


def test_margins_say_what_ranks_say() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(30, 6)), rng.normal(size=(30, 6))
    validation = Validation(np.zeros((30, 1)), np.zeros((30, 1)), np.eye(30, dtype=bool), "")  # type: ignore[arg-type]
    hits = ranks(image, text, validation) <= 5
    assert np.array_equal(hits, margins(image, text, validation) > 0)
    assert 0 < hits.sum() < 60
    change = changes(np.array([1, 9, 5, 6]), np.array([6, 2, 5, 6]))[5]
    assert (change.lost, change.gained, change.queries) == (1, 1, 4)


# --- budgets --------------------------------------------------------------------------------------------------------


def test_budgets_are_read() -> None:
    assert parse_goal("r@5 -0.5") == Goal("r@5 -0.5", "recall", 0.005, 5)
    assert parse_goal("R@10  -2 points").limit == pytest.approx(0.02)
    assert parse_goal("cosine 0.995").kind == "cosine"
    assert parse_goal("size .3").limit == 0.3


@pytest.mark.parametrize("text", ["", "r@5", "r@5 0.5", "r@3 -1", "accuracy 0.9", "cosine 1.2", "size 30%", "r@5 -0"])
def test_a_budget_that_cannot_be_read_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r'the forms are "r@5 -0\.5" .*"cosine 0\.995".*"size 0\.3"'):
        parse_goal(text)


def point(name: str, *, lost: int = 0, gained: int = 0, queries: int = 1000, **fields: Any) -> Point:
    change = paired_change(lost, gained, queries, resamples=10)
    given: dict[str, Any] = {"mb": 10.0, "ratio": 0.25, "cosine": {"image": 0.99, "text": 0.999}, "margin_noise": 0.01}
    return Point(name, "int8", changes=dict.fromkeys((1, 5, 10), change), **given | fields)


def test_the_bound_counts_where_the_sample_can_prove_the_budget() -> None:
    goal = parse_goal("r@5 -0.5")
    few = make_judge(goal, point("int8", lost=12, gained=8), "auto")
    assert not few.proof
    assert "1000 queries, of which int8 changes 20, are too few to prove" in few.why
    assert "about 2,165 would be needed" in few.why
    assert few.meets(point("a", lost=10, gained=5))
    assert not few.meets(point("a", lost=11, gained=5))
    many = make_judge(goal, point("int8", lost=6, gained=5, queries=5000), "auto")
    assert many.proof
    assert many.meets(point("a", lost=10, gained=5, queries=5000))
    assert not many.meets(point("a", lost=24, gained=4, queries=5000)), "measured 0.4 points, not proved"
    assert few.meets(point("a", lost=5, gained=5))
    assert not few.proved(point("a", lost=5, gained=5)), "ten changed results: as much may be lost"
    assert few.proved(point("a", lost=1, gained=5))
    assert make_judge(goal, point("int8", lost=12, gained=8), "bound").proof
    assert not make_judge(goal, point("int8", queries=5000), "estimate").proof
    size = make_judge(parse_goal("size 0.3"), point("int8"), "bound")
    assert size.meets(point("a"))
    assert not size.meets(point("a", ratio=0.31))


# --- the search -----------------------------------------------------------------------------------------------------


def damage(name: str, size: int) -> Damage:
    return Damage("text", name, size, 3 * size, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class FakeLab:
    """Files whose cosine is known: `needed` blocks restore it."""

    def __init__(self, cosine: Callable[[frozenset[str]], float]) -> None:
        self.cosine, self.tried = cosine, []
        self.full = point("fp32", mb=10.0, ratio=1.0)

    def measure(self, name: str, precision: str, keep: Any = None) -> Point:
        blocks = frozenset((keep or {}).get("text", ()))
        self.tried.append(sorted(blocks))
        size = 2.5e6 + sum(3 * SIZES[block] for block in blocks)
        near = {"image": 1.0, "text": self.cosine(blocks)}
        return point(name, mb=size / 1e6, ratio=size / 1e7, cosine=near, keep={"text": tuple(sorted(blocks))})


SIZES = dict.fromkeys("abcdefgh", 100000)
RANKED = [damage(name, size) for name, size in SIZES.items()]


def judge(text: str) -> Judge:
    return make_judge(parse_goal(text), point("int8"), "auto")


def test_the_search_finds_the_shortest_prefix_and_drops_what_is_not_needed() -> None:
    lab: Any = FakeLab(lambda blocks: 0.999 if {"b", "e"} <= blocks else 0.98)
    found = search(lab, judge("cosine 0.99"), RANKED)
    assert found is not None
    assert found.keep == {"text": ("b", "e")}
    assert len(lab.tried) <= 10
    lab = FakeLab(lambda blocks: 0.999)
    assert search(lab, judge("cosine 0.99"), RANKED) is None, "int8 meets it"
    assert sorted(map(len, lab.tried)) == [0, 1, 4], "lists that grow are shown all the same"
    lab = FakeLab(lambda blocks: 0.9)
    assert search(lab, judge("cosine 0.99"), RANKED) is None
    assert lab.tried[-1] == sorted(SIZES), "even all do not suffice"


def test_under_a_size_budget_the_most_worthwhile_blocks_that_fit_stay_in_float() -> None:
    lab: Any = FakeLab(lambda blocks: 0.9)
    found = search(lab, judge("size 0.35"), RANKED)
    assert found is not None
    assert found.keep == {"text": ("a", "b", "c")}
    assert search(lab, judge("size 0.26"), RANKED) is None


def test_the_front_holds_what_no_other_point_beats() -> None:
    ms = {"image": 1.0}
    points = [
        point("a", mb=1, ms=ms, margin_noise=0.3),
        point("b", mb=2, ms=ms, margin_noise=0.2),
        point("worse", mb=2, ms=ms, margin_noise=0.25),
        point("fast", mb=3, ms={"image": 0.5}, margin_noise=0.4),
        Point("failed", "w4", failed="no"),
    ]
    assert front(points) == ["a", "b", "fast"]


# --- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(model: Exportable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, Path]:
    out = tmp_path_factory.mktemp("quantize") / "out"
    return quantize(model, out, budget="size 0.6", data=make_data(), precisions=()), out


def test_from_a_budget_to_a_bundle(made: tuple[Quantized, Path], model: Exportable) -> None:
    found, out = made
    assert found.chosen is not None
    assert found.chosen.precision == "mixed"
    assert found.chosen.ratio <= 0.6
    content = json.loads((out / "quantize.json").read_text())
    assert content["chosen"] == found.chosen.name
    assert "calibration does not use" in content["validation"]
    assert {entry["name"] for entry in content["points"]} >= {"fp32", "int8", found.chosen.name}
    assert all(entry["ms"]["image"] > 0 and math.isfinite(entry["margin_noise"]) for entry in content["points"])
    for picture in ("quantize.png", "quantize.svg"):
        assert (out / picture).stat().st_size > 10_000
    plan = load_plan(out / "plan.json")
    assert plan.keep == found.chosen.keep
    assert plan.contract_sha256 == model.towers.contract.digest()
    assert "size 0.6" in str(plan.budget)
    assert set(plan.why["blocks"]["text"]) == {"token", "qkv", "out", "projection"}
    bundle = Bundle.load(out / "bundle")
    assert {variant.precision for variant in bundle.variants} == {"fp32", "mixed"}
    assert load_plan(out / "bundle" / "mixed.json") == plan
    size = sum((bundle.folder / name).stat().st_size for name in bundle.variant("onnx", "mixed").files.values())
    assert size / 1e6 == pytest.approx(found.chosen.mb, rel=0.01), "what was measured is what is shipped"
    text = table(found)
    assert "chosen" in text
    assert f"Chosen: {found.chosen.name}" in text


def test_a_budget_out_of_reach_names_the_nearest_point(
    made: tuple[Quantized, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = replace(made[0], judge=judge("size 0.1"), chosen=None, nearest=made[0].points[1])
    monkeypatch.setattr("pocketvlm.export.quantize.quantize", lambda *args, **how: found)
    with pytest.raises(SystemExit) as caught:
        cli.main(["quantize", "run", "--budget", "size 0.1", "--out", "x"])
    assert caught.value.code == 1
    assert "No point meets it; the nearest is int8 with size 0." in capsys.readouterr().out


def test_bad_input(made: tuple[Quantized, Path], model: Exportable, tmp_path: Path) -> None:
    how: dict[str, Any] = {"budget": "size 0.5"}
    with pytest.raises(UsageError, match="is not empty"):
        quantize(model, made[1], **how)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"no quantize\.json of this command"):
        quantize(model, tmp_path / "mine", overwrite=True, **how)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        quantize(model, tmp_path / "file", **how)
    with pytest.raises(UsageError, match="coreml was given, whose files run on macOS only"):
        quantize(model, tmp_path / "out", target="coreml", **how)
    with pytest.raises(UnknownNameError, match="precision of target onnx 'w8a8-fixed'; did you mean 'w8a8-static'"):
        quantize(model, tmp_path / "out", precisions=("w8a8-fixed",), **how)
    with pytest.raises(UsageError, match="comes from no run folder"):
        quantize(model, tmp_path / "out", **how)
    one = Exportable(Towers(model.towers.image, None, model.towers.contract), model.tokenizer_json, (), {})
    with pytest.raises(UsageError, match="has not both an image and a text tower"):
        quantize(one, tmp_path / "out", data=make_data(20), **how)
    assert not (tmp_path / "out").exists()


def test_the_example_of_the_docs_is_the_committed_result() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "quantization.md").read_text()
    content = json.loads((root / "benchmarks" / "results" / "quantize.json").read_text())
    assert f"budget `{content['budget']}`" in page
    for entry in content["points"]:
        ms, near = entry["ms"], entry["cosine"]
        row = (
            f"| {entry['mb']:.2f} | {entry['ratio']:.3f} | {ms['image']:.2f} | {ms['text']:.2f} | {near['image']:.5f} |"
        )
        assert row in page, entry["name"]
    assert (root / "docs" / "images" / "quantize.png").is_file()
