"""Token maps, taps and masked pictures through the loop: they reach the objectives, resume, and are refused in time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_toys import toy_recipe

from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.masking import Masking, statistics_kept
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.distill.taps import tap_widths
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.students import load_student

Make = Callable[..., Recipe]
SILENT = Reporter(False)
ALL = [
    {"name": "token-gram", "options": {"student_tap": "trunk.blocks.2"}},
    {"name": "hint", "options": {"student_tap": "tokens", "teacher_tap": "tokens"}},
    {"name": "masked-feature", "options": {"cells": 4, "ratio": 0.5}},
    {"name": "token-alignment", "options": {"width": 8}},
    {"name": "token-alignment", "options": {"variant": "words", "text_tap": "blocks.0", "width": 8}},
]


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, toy_teacher: None) -> Make:
    def make(*overrides: str, **sections: Any) -> Recipe:
        value = toy_recipe(world, teacher_cache, **{"objectives": ALL, **sections})
        value["teacher"] = {"spec": "toy-tokens", "cache": str(teacher_cache)}
        if any(spec["name"] == "token-gram" for spec in value["objectives"]):
            value["teacher"]["token_grid"] = 2
        value["train"] = {**value["train"], "text_batch": 0}
        # a map of 2 x 2 places before the pooling
        value["student"] = copy.deepcopy(value["student"])
        value["student"]["overrides"]["image"]["size"] = 64
        return load_recipe(value, overrides)

    return make


def trainer_of(recipe: Recipe) -> Trainer:
    return Trainer(prepare(recipe, SILENT), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ through the loop


def test_a_run_with_every_tap_learns_and_resumes_to_the_same_loss(recipe: Make, tmp_path: Path) -> None:
    whole = distill_run(recipe(), tmp_path / "run", progress=False)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    names = ("token-gram", "hint", "masked-feature", "token-alignment", "token-alignment#4")
    assert {f"loss/{name}" for name in names} == {key for key in row if key.startswith("loss/")}
    assert all(row[f"loss/{name}"] > 0 for name in names)
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000008*"):
        path.unlink()
    again = distill_run(recipe(), tmp_path / "run", resume=True, progress=False)
    assert again.final_loss == whole.final_loss
    # projectors are in the checkpoint, and nothing of them is in the student
    state = torch.load(next((tmp_path / "run" / "checkpoints").glob("*8.pt")), weights_only=True)
    assert {key.split(".")[1] for key in state["objectives"] if key.startswith("3.")} == {
        "log_scale", "image_projector", "text_projector",
    }  # fmt: skip
    assert not [name for name in load_student(whole.student).state_dict() if "projector" in name]


def test_what_objectives_see_is_what_the_models_gave(recipe: Make) -> None:
    trainer = trainer_of(recipe())
    batch, student = trainer.feed.make(0), trainer.student.eval()
    ours, theirs = trainer.feed.forward(student, batch)["pairs"]
    assert theirs is not None
    assert batch.pixels is not None
    plain = student.encode_image(batch.pixels, taps=["trunk.blocks.2", "tokens"])
    for name in ("trunk.blocks.2", "tokens"):
        torch.testing.assert_close(ours.taps[name], plain.taps[name])
    # the last map is what the trunk pools
    last = plain.taps["tokens"]
    assert last.ndim == 4
    torch.testing.assert_close(student.image_tower.trunk.forward_head(last), plain.features)  # type: ignore[operator]
    plan, cache = trainer.order.plan(0), trainer.prepared.images
    assert cache is not None
    uids = [trainer.prepared.samples[row].uid for row in plan.rows]
    assert torch.equal(theirs.taps["tokens"], cache.tokens(uids, plan.views))
    assert theirs.taps["tokens"].shape == (8, 4, 12)
    # words of the captions, in full length, padding told apart
    length, pad = student.text_spec.context_length, student.text_spec.pad_id
    captions = [text for text in plan.captions if text is not None]
    ids = torch.from_numpy(trainer.prepared.tokenizer.encode(captions))
    full = student.encode_text(ids, taps=["tokens", "blocks.0"])
    assert ours.text_mask is not None
    assert torch.equal(ours.text_mask, ids != pad)
    assert ours.taps["text.tokens"].shape == (8, length, 32)
    for name in ("tokens", "blocks.0"):
        found, wanted = ours.taps[f"text.{name}"], full.taps[name]
        torch.testing.assert_close(found[ours.text_mask], wanted[ours.text_mask], rtol=1e-4, atol=1e-5)


def test_rows_without_captions_have_no_words(recipe: Make, world: Path) -> None:
    trainer = trainer_of(recipe(objectives=[{"name": "token-alignment"}]))
    for sample in trainer.prepared.samples[::2]:
        object.__setattr__(sample, "captions", ())
    batch = trainer.feed.make(0)
    assert batch.with_text is not None
    assert 0 < len(batch.with_text) < 8
    ours, _ = trainer.feed.forward(trainer.student, batch)["pairs"]
    assert ours.text_mask is not None
    has_words = ours.text_mask.any(dim=1)
    assert has_words.nonzero()[:, 0].tolist() == batch.with_text.tolist()
    assert ours.taps["text.tokens"][~has_words].abs().max() == 0
    assert trainer.one_step(batch)["loss"] > 0


def test_the_cost_of_token_maps_is_told_before_they_are_made(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Reporter, "line", lambda self, text: told.append(text))
    prepare(recipe(f"teacher.cache={tmp_path}", "teacher.cache_dtype=bfloat16"), SILENT)
    # 40 x 3 x 4 x 12 numbers of two bytes
    cost = "token maps of 40 pictures x 3 views, 2 x 2 places of 12 numbers in bfloat16: 11.5 kB"
    assert [cost in line for line in told].count(True) == 1
    assert (
        sum(40 * 3 * 4 * 12 * 2 for path in tmp_path.glob("*views*") if (path / "cache.json").exists())
        == 40 * 3 * 4 * 12 * 2
    )


# ------------------------------------------------------------------------------------------------ below a cut


def test_taps_above_a_cut_are_read_and_below_it_refused(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    cut = "train.cut_after_block=1"
    trainer = trainer_of(recipe(cut))
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    assert trainer.one_step(trainer.feed.make(0))["loss/masked-feature"] > 0
    moved = {name for name, value in trainer.student.state_dict().items() if not torch.equal(value, before[name])}
    assert not [n for n in moved if n.startswith(("image_tower.trunk.conv_stem", "image_tower.trunk.blocks.1"))]
    for tap in ("trunk.blocks.1", "trunk.blocks.0.0.conv", "trunk.conv_stem"):
        below = [{"name": "token-gram", "options": {"student_tap": tap}}]
        with pytest.raises(UsageError, match=r"lies below train\.cut_after_block 1"):
            prepare(recipe(cut, objectives=below), SILENT)


# ------------------------------------------------------------------------------------------------ masked pictures

SPEC = ImageSpec(size=30, mean=(0.5, 0.25, 1.0))


def test_masks_are_a_function_of_seed_step_and_uid() -> None:
    masking = Masking(0.75, 4)
    first = masking.mask(0, 3, "a")
    assert first.shape == (4, 4)
    assert first.sum() == 12
    assert np.array_equal(first, masking.mask(0, 3, "a"))
    others = [masking.mask(1, 3, "a"), masking.mask(0, 4, "a"), masking.mask(0, 3, "b")]
    assert not any(np.array_equal(first, other) for other in others)
    # every cell is masked about as often as any other
    counts = sum(masking.mask(0, step, "a").astype(int) for step in range(400))
    assert 0.65 < counts.min() / 400 <= counts.max() / 400 < 0.85


def test_masked_cells_are_painted_in_the_mean_colour_and_others_are_left() -> None:
    pixels = np.random.default_rng(0).integers(1, 120, (2, 30, 30, 3)).astype(np.uint8)
    before, masking = pixels.copy(), Masking(0.4, 4)
    found = masking.paint(pixels, 5, 7, ["a", "b"], SPEC)
    assert np.array_equal(pixels, before)
    for index, uid in enumerate(["a", "b"]):
        mask = masking.mask(5, 7, uid)
        for y, x in np.ndindex(30, 30):
            hidden = mask[y * 4 // 30, x * 4 // 30]
            assert found[index, y, x].tolist() == ([128, 64, 255] if hidden else before[index, y, x].tolist())


def test_masked_pictures_leave_no_trace_in_the_statistics(recipe: Make) -> None:
    trainer = trainer_of(recipe(objectives=[ALL[2]]))
    tower = trainer.student.train().image_tower
    batch = trainer.feed.make(0)
    assert batch.masked is not None
    assert batch.pixels is not None
    assert batch.masked.shape == batch.pixels.shape
    before = {name: value.clone() for name, value in tower.named_buffers()}
    masked = trainer.feed._masked(trainer.student, batch.masked)
    assert all(torch.equal(value, before[name]) for name, value in tower.named_buffers())
    assert masked.requires_grad
    momenta = {module.momentum for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert 0.0 not in momenta
    with pytest.raises(RuntimeError, match="in the middle"), statistics_kept(tower):
        raise RuntimeError("in the middle")
    assert momenta == {module.momentum for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    trainer.feed.forward(trainer.student, batch)
    assert not all(torch.equal(value, before[name]) for name, value in tower.named_buffers())


def test_two_masks_in_one_step_are_refused(recipe: Make) -> None:
    twice = [ALL[2], {"name": "matryoshka", "options": {"inner": {"name": "masked-feature"}, "dims": [8, 16]}}]
    with pytest.raises(UsageError, match=r"2 different masked views are asked for \(0.5 of 4 x 4, 0.75 of 7 x 7\)"):
        recipe(objectives=twice)
    twice[1]["options"]["inner"]["options"] = ALL[2]["options"]  # type: ignore[index]
    assert trainer_of(recipe(objectives=twice)).feed.masking == Masking(0.5, 4)


# ------------------------------------------------------------------------------------------------ refusals


def test_tokens_of_a_teacher_without_any_are_refused_before_anything_is_cached(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'toy', which gives embeddings only"):
        prepare(recipe("teacher.spec=toy", f"teacher.cache={tmp_path / 'cache'}"), SILENT)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UsageError, match=r"maps of 5 x 5 places .* whose own have 4 x 4"):
        prepare(recipe("teacher.token_grid=5"), SILENT)


def test_tokens_of_embeddings_on_disk_are_refused(recipe: Make, world: Path, tmp_path: Path) -> None:
    from distill_toys import ToyTeacher, ToyTokenTeacher

    from pocketvlm.data import open_data
    from pocketvlm.distill.evaluate import questions_of
    from pocketvlm.teachers.cache_build import build_cache

    source = open_data(str(world))
    texts = questions_of(source).texts
    build_cache(ToyTeacher(), source.samples, texts, tmp_path / "bare")
    build_cache(ToyTokenTeacher(), source.samples, texts, tmp_path / "full", token_grid=4)
    changes = ["data.words=null", "views.count=1", "teacher.token_grid=null"]
    with pytest.raises(UsageError, match="the embeddings on disk hold no token maps"):
        prepare(recipe(f"teacher.spec=embeddings:{tmp_path / 'bare'}", *changes), SILENT)
    with pytest.raises(UsageError, match=r"token_grid is 2 but the embeddings on disk keep maps of 4 x 4"):
        prepare(recipe(f"teacher.spec=embeddings:{tmp_path / 'full'}", *changes[:2]), SILENT)
    trainer = trainer_of(recipe(f"teacher.spec=embeddings:{tmp_path / 'full'}", *changes))
    assert trainer.one_step(trainer.feed.make(0))["loss/token-gram"] > 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"student_tap": "trunk.block.2"}, UnknownNameError, r"did you mean 'trunk\.blocks"),
        ({"student_tap": "token"}, UnknownNameError, "did you mean 'tokens'"),
        ({"student_tap": "trunk.blocks"}, UsageError, "the forward never calls as a whole"),
    ],
)
def test_taps_that_are_not_there_are_refused_before_the_first_step(
    recipe: Make, options: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        prepare(
            recipe("student.overrides.image.levels=[1]", objectives=[{"name": "token-gram", "options": options}]),
            SILENT,
        )


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"name": "token-gram", "options": {"teacher_tap": "token"}}, "unknown teacher tap 'token'; did you mean"),
        ({"name": "hint", "batch": "texts", "options": {"student_tap": "tokens"}}, "a text-only batch has not"),
        ({"name": "masked-feature", "batch": "texts"}, "masks pictures, which a text-only batch has not"),
        ({"name": "masked-feature", "options": {"ratio": [1]}}, "some patches must be masked"),
        ({"name": "hint", "options": {"teacher_tap": "tokens"}}, "no student_tap"),
        ({"name": "token-alignment", "options": {"text_tap": ""}}, "must name an inner activation"),
        ({"name": "clip"}, "token_grid is set and no objective reads the teacher's tokens"),
    ],
)
def test_recipes_that_cannot_work_are_refused(recipe: Make, objective: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recipe("train.text_batch=8", "teacher.token_grid=2", objectives=[objective])


# ------------------------------------------------------------------------------------------------ export


def test_train_only_heads_are_in_no_exported_file(recipe: Make, tmp_path: Path) -> None:
    """Projectors as wide as nothing else, filled with a number that no initialiser draws, after a step of training."""
    import onnx
    from onnx.numpy_helper import to_array

    from pocketvlm.export.source import open_source
    from pocketvlm.export.targets import get_target
    from pocketvlm.students import save_student

    mark = 7.53125
    wide = [{**spec, "options": {**spec["options"], "width": 77}} for spec in ALL[3:]]
    trainer = trainer_of(recipe(objectives=[*ALL[:3], *wide]))
    trainer.one_step(trainer.feed.make(0))
    heads = dict(trainer.objectives.named_parameters())
    assert sum(value.numel() for value in heads.values()) > 77 * 32
    for value in heads.values():
        torch.nn.init.constant_(value, mark)
    trainer.one_step(trainer.feed.make(1))  # with them in use
    save_student(trainer.student, tmp_path / "student")
    exported = open_source(tmp_path / "student")
    variant = get_target("onnx").lower(exported.towers, precision="fp32", folder=tmp_path, calibration=None)
    for tower, file in variant.files.items():
        graph = onnx.load(str(tmp_path / file)).graph
        weights = {item.name: to_array(item) for item in graph.initializer}
        assert sum(value.size for value in weights.values()) > 1000
        for name, value in weights.items():
            assert "projector" not in name
            assert 77 not in value.shape, (tower, name)
            assert value.dtype.kind != "f" or not np.isclose(value, mark, atol=0.01).any(), (tower, name)
        # nothing was added for the taps: the embedding is the only output
        assert [output.name for output in graph.output] == ["embedding"]


# ------------------------------------------------------------------------------------------------ other towers


@pytest.mark.parametrize(
    ("backbone", "size", "shape"),
    [
        ("mobilenetv4_conv_small_035", 64, (1, 336, 2, 2)),
        ("tf_efficientnet_lite0", 64, (1, 1280, 2, 2)),
        ("fastvit_t8", 64, (1, 768, 2, 2)),
        ("repvit_m0_9", 64, (1, 384, 2, 2)),
        ("vit_tiny_patch16_224", 64, (1, 16, 192)),
        ("swin_tiny_patch4_window7_224", 224, (1, 768, 7, 7)),
    ],
)
def test_every_kind_of_trunk_shows_its_last_map(backbone: str, size: int, shape: tuple[int, ...]) -> None:
    from pocketvlm.students.config import ImageConfig
    from pocketvlm.students.image import build_image_tower
    from pocketvlm.students.student import recorded

    extra = {"img_size": size} if backbone.startswith("vit") else {}
    tower = build_image_tower(ImageConfig(backbone=backbone, size=size, backbone_args=extra), 16).eval()
    pixels = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
    names = list(dict(tower.named_modules()))
    with torch.no_grad(), recorded(tower, ["tokens"]) as seen:
        embedding, _ = tower(pixels)
    assert seen["tokens"].shape[0] == 1
    assert seen["tokens"].ndim == len(shape)
    assert seen["tokens"].shape[1:] == shape[1:]
    assert "forward_head" not in vars(tower.trunk)
    assert list(dict(tower.named_modules())) == names
    with torch.no_grad():
        assert torch.equal(tower(pixels)[0], embedding)


def test_widths_are_asked_of_the_student_and_its_mode_is_kept(recipe: Make) -> None:
    prepared = prepare(recipe(), SILENT)
    from pocketvlm.distill.taps import asked_taps

    found = tap_widths(prepared.student.train(), asked_taps(prepared.recipe), None)
    assert prepared.student.training
    assert found.keys() == {"trunk.blocks.2", "tokens", "text.tokens", "text.blocks.0"}
    assert found["text.tokens"] == found["text.blocks.0"] == 32
