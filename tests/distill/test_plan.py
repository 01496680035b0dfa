"""What a plan says is what a run takes: its work against torch's counter, its memory and cache against real ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import toy_recipe
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pocketvlm.distill import plan as planning
from pocketvlm.distill.counting import Growth, Work, count
from pocketvlm.distill.devices import load_devices
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.plan import make_plan
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.rehearsal import interleaved, timed_pictures
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.students import build_student, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(world: Path, toy_teacher: None, teacher_cache: Path) -> Callable[..., Recipe]:
    """The toy recipe with overrides."""

    def make(*overrides: str, **sections: Any) -> Recipe:
        value = toy_recipe(world, teacher_cache, **sections)
        return load_recipe(value, ["train.device=cpu", *overrides])

    return make


def named(plan: planning.Plan) -> str:
    return json.dumps(plan.assumptions)


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnv4-035", "vit-tiny"])
def test_forward_macs_are_what_torch_counts(name: str) -> None:
    """Convolutions and linear layers to the last one; scores of fused attention, which torch leaves out on a CPU, are
    2 N^2 W a layer."""
    student = build_student(name, embed_dim=16, tokenizer_json=train_tokenizer(["a b c"], 64)).eval()
    size = student.image_spec.size
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens = student.encode_image(pixels, taps=("tokens",)).taps["tokens"]
    extra = 0
    if name == "vit-tiny":
        trunk: Any = student.image_tower.trunk
        places = tokens.shape[1] + trunk.num_prefix_tokens
        extra = len(trunk.blocks) * 2 * places**2 * tokens.shape[2]
    with torch.no_grad():
        assert count(lambda: student.encode_image(pixels)).macs == counter.get_total_flops() // 2 + extra


def test_backward_of_a_grouped_convolution_is_two_forwards() -> None:
    """Counted by loops: an output place takes one multiplication per weight of its group, and so does each gradient."""
    for groups, stride in ((1, 1), (4, 2), (8, 1)):
        layer = nn.Conv2d(8, 16, 3, stride=stride, padding=1, groups=groups, bias=False)
        x = torch.randn(2, 8, 10, 10, requires_grad=True)
        places = 0
        for _ in range(2):
            for _ in range(0, 10, stride):
                for _ in range(0, 10, stride):
                    places += 1
        forward = places * 16 * (8 // groups) * 9
        assert count(partial(layer, x)).convolution == forward
        assert count(partial(_back, layer, x)).convolution == 3 * forward
        # the first layer of a tower needs no gradient of its pictures
        assert count(partial(_back, layer, x.detach())).convolution == 2 * forward


def _back(layer: nn.Module, x: torch.Tensor) -> None:
    layer(x).sum().backward()


def test_saved_bytes_are_each_storage_once_and_no_parameter() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    assert count(lambda: layer(x)).saved == x.nbytes
    assert count(lambda: (x * x) + x.exp()).saved == x.nbytes + x.nbytes  # x, and the exponential


def test_growth_goes_through_its_points() -> None:
    def at(s: float) -> Work:
        return Work(0, 5 + 7 * s + 3 * s * s, 40 * s)

    found = Growth.through(at(1), at(2), at(4))
    for s in (1, 4, 100):
        assert found.at(s).matrix == pytest.approx(at(s).matrix)
        assert found.at(s).saved == pytest.approx(at(s).saved)
    # rounding is no square: 0.4 of 11, 22 and 44 rows
    rounded = Growth.through(Work(0, 4), Work(0, 9), Work(0, 18))
    assert rounded.at(1000).matrix == pytest.approx(4500, rel=0.1)


def test_every_beginning_of_the_few_has_the_share_of_captions(world: Path) -> None:
    from pocketvlm.data import Caption, ImageRef, Sample

    rows = [Sample(f"{i}", ImageRef(data=b""), (Caption("x"),) if i < 10 else ()) for i in range(100)]
    found = interleaved(rows, 40, 0.25)
    for size in (4, 8, 20, 40):
        assert sum(bool(sample.captions) for sample in found[:size]) == size // 4
    assert len({sample.uid for sample in found}) == 40


def test_a_gpu_is_timed_over_what_goes_through_it_at_once(recipe: Callable[..., Recipe]) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    small, large = 1e7, 2e10
    assert timed_pictures(recipe("train.batch_size=16"), cuda, small) == 16
    whole = recipe("train.batch_size=4096")
    assert [timed_pictures(whole, cuda, macs) for macs in (0.0, small, large)] == [1024, 1024, 100]
    assert [timed_pictures(whole, cpu, macs) for macs in (0.0, small, large)] == [128, 128, 8]
    parts = recipe("train.batch_size=4096", "train.micro_batch=64")
    assert [timed_pictures(parts, device, small) for device in (cuda, cpu)] == [64, 128]


# --- a plan against a run ---------------------------------------------------------------------------------------------


def trained(recipe: Recipe, steps: int = 1) -> Trainer:
    trainer = Trainer(prepare(recipe, Reporter(False)), torch.device("cpu"))
    for step in range(steps):
        trainer.one_step(trainer.feed.make(step))
    return trainer


def test_a_step_is_counted_as_it_runs(recipe: Callable[..., Recipe]) -> None:
    """The whole data as one batch, so that nothing is scaled; only the texts' length is an average."""
    asked = recipe("train.batch_size=40", "train.text_batch=8", "data.words.size=60")
    plan = make_plan(asked, device="cpu")
    trainer = trained(asked)
    batch = trainer.feed.make(1)
    assert batch.ids is not None
    real = count(lambda: trainer.one_step(batch))
    per_token = 0.05 * real.macs
    assert plan.values["work"]["step_macs"] == pytest.approx(real.macs, abs=per_token)


def test_memory_is_that_of_the_tensors(recipe: Callable[..., Recipe]) -> None:
    asked = recipe()
    memory = make_plan(asked, device="cpu").values["memory"]
    trainer = trained(asked)
    state = [v for row in trainer.optimizer.state.values() for v in row.values() if torch.is_tensor(v)]
    without = [p for p in trainer.parameters if p.grad is None]
    assert memory["optimizer_bytes"] == sum(v.nbytes for v in state) + sum(2 * p.nbytes + 4 for p in without)
    assert sum(p.numel() for p in without) < 0.05 * memory["trained_parameters"]
    assert memory["gradient_bytes"] == sum(p.nbytes for p in trainer.parameters)
    assert trainer.average is not None
    assert memory["average_bytes"] == sum(v.nbytes for v in trainer.average.module.state_dict().values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_those_of_a_cache(recipe: Callable[..., Recipe], tmp_path: Path, dtype: str) -> None:
    asked = recipe("views.count=3", f"teacher.cache_dtype={dtype}", f"teacher.cache={tmp_path}")
    disk = make_plan(asked, device="cpu").values["disk"]
    assert disk["cache_dtype"] == dtype
    prepare(asked, Reporter(False))
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    # what the header of each file has besides its rows is not counted
    assert 0 < sum(sizes) - disk["cache_bytes"] < 700 * len(sizes)
    assert disk["cache_bytes_bfloat16"] < disk["cache_bytes_float32"]


def test_what_stands_still_costs_less(recipe: Callable[..., Recipe]) -> None:
    def work(*overrides: str, **sections: Any) -> float:
        return make_plan(recipe(*overrides, **sections), device="cpu").values["work"]["train_macs_per_picture"]

    whole = work()
    assert work("train.lr_scale={image_tower: 0}") < whole
    assert work("train.cut_after_block=2") < whole
    assert work("train.text_batch=32") > whole
    half = work("train.lr_scale={image_tower: 0}", "train.steps=8")
    # frozen in half of the steps: half way between
    assert work("train.freeze={image_tower: 4}", "train.steps=8") == pytest.approx((whole + half) / 2, rel=1e-6)
    momentum = [{"name": "clip"}, {"name": "momentum"}]
    assert work("train.text_batch=0", objectives=momentum) > work("train.text_batch=0", objectives=momentum[:1])


def test_devices_share_the_towers_and_not_the_objectives(recipe: Callable[..., Recipe]) -> None:
    one, four = (make_plan(recipe(), device="h100", count=count).values["memory"] for count in (1, 4))
    # what is kept once for a batch is not divided
    assert four["activation_bytes"] == pytest.approx(one["activation_bytes"] / 4, rel=5e-3)
    assert four["objective_bytes"] == one["objective_bytes"]
    assert four["device_bytes"] < one["device_bytes"]


def test_samples_and_epochs_decide_the_steps(recipe: Callable[..., Recipe]) -> None:
    run = make_plan(recipe(), device="cpu").values["run"]
    assert (run["pictures"], run["steps"]) == (40, 8)
    run = make_plan(recipe(), device="cpu", samples=1001).values["run"]
    assert (run["pictures"], run["steps"]) == (1001, 126)  # 1001 / 8, rounded up
    plan = make_plan(recipe(), device="cpu", samples=1e6, epochs=3, price=2.5)
    assert plan.values["run"]["steps"] == 375_000
    time = plan.values["time"]
    assert time["cost"] == pytest.approx(2.5 * time["device_hours"])
    assert time["device_hours"] == pytest.approx(24 * time["days"])


# --- nothing is assumed in silence ------------------------------------------------------------------------------------


def test_every_constant_that_matters_is_named(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each constant of the device is doubled in turn: where the plan changes, its assumptions name the constant."""
    kept: list[Any] = []
    real = planning.rehearse

    def once(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(real(*args, **kwargs))
        return kept[0]

    monkeypatch.setattr(planning, "rehearse", once)
    devices = load_devices()
    # the toys' steps are so short that nothing else would show
    devices["h100"] = dataclasses.replace(devices["h100"], step_floor_s=1e-9)
    monkeypatch.setattr(planning, "load_devices", lambda: dict(devices))
    asked = recipe("data.ram_gb=0")
    base = make_plan(asked, device="h100", samples=1e6, count=3)
    moved = []
    for name in devices["h100"].sources:
        other = dataclasses.replace(devices["h100"], **{name: 2 * getattr(devices["h100"], name)})
        monkeypatch.setattr(planning, "load_devices", lambda other=other: {"h100": other})
        found = make_plan(asked, device="h100", samples=1e6, count=3)
        if found.values != base.values:
            moved.append(name)
            kind, source = devices["h100"].sources[name]
            assert f"h100: {name}" in named(base)
            assert f"{kind}: {source}" in [row["because"] for row in base.assumptions]
    assert {"matrix_flops", "convolution_flops", "decode_per_core", "memory_gb"} <= set(moved)
    assert "h100: step_floor_s" in named(base)
    for what in ("many devices", "not counted", "tokens of a text", "passes over the pictures", "decoding"):
        assert any(row["assumption"] == what for row in base.assumptions), what


def test_without_data_and_teacher_it_says_what_it_made_up(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe("data.train=wds:s3://bucket/{0000..9999}.tar")
    with pytest.raises(UsageError, match="say so with --samples"):
        make_plan(asked, device="cpu")
    with pytest.raises(UsageError, match=r"^data\.stream\.shards 'x\.tar' cannot be opened .*--samples"):
        make_plan(recipe("data.train=''", "data.stream={shards: x.tar}"), device="cpu")
    monkeypatch.setattr(planning, "open_teacher", lambda *a, **k: (_ for _ in ()).throw(UsageError("no weights here")))
    plan = make_plan(asked, device="cpu", samples=1e9)
    assert plan.values["disk"]["data_bytes"] == 1e9 * planning.PICTURE_BYTES
    assert plan.values["time"]["total_s"] is None
    assert plan.values["work"]["teacher_picture_macs"] is None
    rows = {row["assumption"]: row for row in plan.assumptions}
    assert f"{planning.PICTURE_BYTES:,}" in rows["bytes of a picture"]["value"]
    assert "no weights here" in rows["teacher toy"]["because"]
    assert "fill the context" in rows["tokens of a text"]["because"]
    assert {"pictures to rehearse on", "captions of a picture"} <= rows.keys()
    shown = {row["quantity"]: row for row in plan.rows()}
    assert shown["teacher, a view"]["value"] == shown["in all"]["value"] == "not known"


def test_the_table_says_where_its_constants_are_from() -> None:
    """What a result was committed for is in the table as it was measured, and nothing else is called measured."""
    folder, devices = ROOT / "benchmarks/results", load_devices()
    files = {"cpu": folder / "device_constants.json"}
    files |= {path.stem.removeprefix("device_constants_"): path for path in folder.glob("device_constants_*.json")}
    results = {name: json.loads(path.read_text()) for name, path in files.items()}
    for name, device in devices.items():
        for key, (kind, source) in device.sources.items():
            assert kind in ("measured", "vendor", "assumed"), (name, key)
            assert source, (name, key)
            assert kind != "measured" or name in results, (name, key)
        if name not in results:
            assert device.decode_per_core == devices["cpu"].decode_per_core
    for name, result in results.items():
        for key, value in result["constants"].items():
            assert getattr(devices[name], key) == value, (name, key)
            assert devices[name].sources[key] == ("measured", result["command"]), (name, key)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, part in value.items() for name, leaf in _leaves(part, f"{path}/{key}").items()}


def test_constants_may_be_given_in_place_of_a_name(recipe: Callable[..., Recipe]) -> None:
    table = load_devices()["h100"]
    named, given = (_leaves(make_plan(recipe(), device=device).values) for device in ("h100", table))
    assert given.keys() == named.keys()
    for name, value in named.items():
        # a scalar that was freed and its place taken again is counted in one of the two and not in the other
        same = isinstance(value, float) and "bytes" in name
        assert given[name] == (pytest.approx(value, rel=1e-3) if same else value), name
    named, given = (make_plan(recipe(), device=device) for device in ("h100", table))
    assert given.assumptions == named.assumptions
    other = dataclasses.replace(table, name="mine", step_floor_s=3.0)
    plan = make_plan(recipe(), device=other)
    assert plan.device == "mine"
    assert plan.values["time"]["step_s"] == 3.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"samples": -5}, "--samples -5"),
        ({"samples": float("inf")}, "--samples inf"),
        ({"epochs": 0}, "--epochs 0"),
        ({"count": 0}, "--count 0"),
        ({"price": -1}, "--price -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(recipe: Callable[..., Recipe], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_plan(recipe(), device="cpu", **given)


def test_pictures_are_decoded_by_as_many_as_the_loop_has(recipe: Callable[..., Recipe]) -> None:
    """Listed data by one thread, a stream by its workers while there are cores; a stream keeps no picture."""
    device = dataclasses.replace(load_devices()["h100"], cores=8)

    def decode_s(*overrides: str, ram: float = 0) -> float:
        plan = make_plan(recipe(f"data.ram_gb={ram}", *overrides), device=device, samples=1e5, epochs=10)
        return float(plan.values["time"]["decode_s"])

    def stream(workers: int) -> tuple[str, ...]:
        return "data.train=''", f"data.stream={{shards: x.tar, workers: {workers}}}"

    one = 1e6 / device.decode_per_core
    assert decode_s() == pytest.approx(one, rel=1e-3)
    assert [decode_s(*stream(workers)) for workers in (0, 2, 99)] == pytest.approx([one, one / 2, one / 8], rel=1e-3)
    assert decode_s(ram=1e4) < 0.5 * one
    assert decode_s(*stream(0), ram=1e4) == pytest.approx(one, rel=1e-3)
    here = [make_plan(recipe(*asked), samples=1e5).values["time"]["prepare_s"] for asked in ((), stream(0))]
    assert here[0] > 0 == here[1], "a stream is not decoded before it is trained on"


def test_an_unknown_device_is_answered_with_the_nearest(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UnknownNameError, match="'h100'"):
        make_plan(recipe(), device="h10")
