"""The sweep over visual tokens on a tiny model: what it measures, what of it is kept, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm import cli
from pocketvlm.data.scene_questions import CAPTIONS, Question, ask_about
from pocketvlm.data.scenes import LANGUAGES, Picture, PictureSet, SceneTable
from pocketvlm.distill.vlm.evaluate import Asked, answer_scenes, see_scenes
from pocketvlm.distill.vlm.sweep import NAMES, applicable, prefill_times, reduction_of, retained, sweep
from pocketvlm.distill.vlm.sweep_report import plot, rows
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.students.vlm import Vlm, build_vlm, save_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import VlmConfig


def _pictures() -> PictureSet:
    names = [f"thing {letter}" for letter in "abcdefgh"]
    kinds, colours = ("animal", "tool"), ("red", "blue")
    return PictureSet(
        [
            Picture(f"made/{n}", dict.fromkeys(LANGUAGES, n), kinds[i % 2], colours[i // 4], n)
            for i, n in enumerate(names)
        ],
        [np.full((24, 24, 3), 25 * place, np.uint8) for place in range(8)],
    )


PICTURES = _pictures()
TOKENIZER = train_vlm_tokenizer(
    [text for i in range(100) for q in ask_about(PICTURES, 0, i, 8)[1] for text in (q.text, q.answer)], 600
)


def _model(backbone: str = "test_efficientnet", size: int = 192, **changes: object) -> Vlm:
    values = {
        "name": "tiny",
        "vision": {"backbone": backbone, "size": size},
        "connector_hidden": 16,
        "connector_heads": 2,
        "decoder": {"width": 32, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 48, "context_length": 160},
    }
    return build_vlm(VlmConfig.model_validate(values | changes), TOKENIZER, seed=1).eval()


@pytest.fixture(scope="module")
def model() -> Vlm:
    return _model()


def test_what_was_seen_once_answers_as_the_pixels_do(model: Vlm) -> None:
    table = SceneTable.build(PICTURES, 192)
    seen = see_scenes(model, PICTURES, table, scenes=7, scored=("distinct",), batch=3)
    assert len(seen) == 7
    with torch.no_grad():
        _, plain = answer_scenes(model, PICTURES, table, scenes=7, questions=3, batch=5)
        _, again = answer_scenes(model, PICTURES, None, scenes=7, questions=3, batch=5, seen=seen)
        _, short = answer_scenes(model, PICTURES, None, scenes=7, questions=3, seen=seen, captions=False)
    assert plain == again
    assert [(row.scene, row.question) for row in short] == [
        (row.scene, row.question) for row in plain if row.question.type not in CAPTIONS
    ]


def test_methods_are_those_that_the_model_can_do(model: Vlm) -> None:
    found = applicable(model)
    assert model.connector.tokens == 36
    assert found["distinct"] == [18, 12, 9, 6, 4]
    assert (found["pool"], found["distinct-rows"]) == ([9, 4], [18, 12, 6])
    assert not {"fastervlm", "vtc-cls", "fopru-rank", "fopru-row", "connector"} & found.keys()
    vit = applicable(_model("test_vit", 64, vision={"backbone": "test_vit", "size": 64}), (4,))
    assert {"fastervlm", "vtc-cls", "fopru-rank", "fopru-row"} <= vit.keys()
    mqt = applicable(_model(connector="mqt", connector_tokens=6), (5, 3))
    assert mqt == {name: [5, 3] for name in ("pitome", "pyramiddrop", "aim", "connector")}
    for name, numbers in found.items():
        assert reduction_of(name, numbers[0], "renumbered").positions == "renumbered"
    with pytest.raises(UnknownNameError, match="did you mean 'pitome'"):
        applicable(model, (), ("pitme",))
    with pytest.raises(UsageError, match="does not allow"):
        applicable(model, (7,), ("pool",))


def _asked(right: list[list[bool]]) -> list[Asked]:
    return [
        Asked(scene, Question("count", "?", "1"), "1" if one else "2") for scene, row in enumerate(right) for one in row
    ]


def test_what_is_kept_is_a_ratio_over_the_same_questions() -> None:
    whole = _asked([[True, True], [True, False], [False, False], [True, True]])
    half = _asked([[True, False], [True, False], [True, False], [False, False]])
    share, (low, high) = retained(half, whole)
    assert share == pytest.approx(3 / 5)
    assert 0 <= low < share < high
    assert retained(whole, whole) == (1.0, (1.0, 1.0))


def test_a_sweep_measures_every_setting_and_puts_the_model_back(
    model: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of a model that has learnt nothing no answer would be right
    monkeypatch.setattr("pocketvlm.distill.vlm.evaluate.exact_match", lambda said, told: len(said + told) % 3 > 0)
    own = reduction_of("even", 16)
    model.reduce_tokens(own)
    settings = [("pool", reduction_of("pool", 9)), ("pyramiddrop", reduction_of("pyramiddrop", 4))]
    points = sweep(model, PICTURES, settings=settings, scenes=6, questions=3, rounds=2)
    assert model.reduction == own
    model.reduce_tokens(None)
    assert [point.name for point in points] == ["all tokens", "pool", "pyramiddrop"]
    assert points[0].tokens == (36,) * 4
    assert points[0].kept == 1
    assert points[1].kept == pytest.approx(points[1].accuracy / points[0].accuracy)
    assert points[1].tokens == (9,) * 4
    assert points[2].tokens == (36, 17, 8, 4)
    assert points[2].mean_tokens == 16.25
    assert points[1].flops["decoder"] < points[2].flops["decoder"] < points[0].flops["decoder"]
    tower = {point.flops["whole"] - point.flops["decoder"] for point in points}
    assert len(tower) == 1
    assert all(0 < point.ms["decoder"] < point.ms["whole"] for point in points)
    # the model's own accuracy, without captions
    with torch.no_grad():
        _, asked = answer_scenes(model, PICTURES, SceneTable.build(PICTURES, 192), scenes=6, questions=3)
    short = [row.right for row in asked if row.question.type not in CAPTIONS]
    assert points[0].accuracy == pytest.approx(sum(short) / len(short))
    table = rows(points)
    assert table[0]["faster"] == "1.00x"
    assert table[2]["tokens a layer"] == "16.2"
    plot(points, [tmp_path / "plot.svg"], "title")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<?xml")
    times = prefill_times(model, [None, settings[0][1]], rounds=1)
    assert [set(row) for row in times] == [{"decoder", "whole", "decoder_cpu", "whole_cpu"}] * 2
    assert model.reduction is None


def test_the_command_writes_what_it_measured(
    model: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pocketvlm.data.scenes.picture_set", lambda pool, fold, limit: PICTURES)
    save_vlm(model, tmp_path / "run")
    command = ["tokens", "sweep", str(tmp_path / "run"), "--scenes", "2", "--rounds", "1", "--keep", "9"]
    command += ["--methods", "pool", "distinct", "--device", "cpu"]
    cli.main([*command, "--out", str(tmp_path / "out")])
    assert "pool" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert {point["name"] for point in written["points"]} == {"all tokens", "pool", "distinct"}
    assert (written["visual_tokens"], written["pool"], written["scenes"]) == (36, "test", 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokens.json", "tokens.png", "tokens.svg"}
    for wrong, said in [
        (["--out", str(tmp_path / "out")], "holds the results of an earlier sweep"),
        (["--scenes", "0"], "measures nothing"),
    ]:
        with pytest.raises(SystemExit):
            cli.main([*command, *wrong])
        assert said in capsys.readouterr().err
    cli.main([*command, "--out", str(tmp_path / "out"), "--overwrite", "--json"])
    assert json.loads(capsys.readouterr().out)["pool"] == "test"
    assert set(NAMES) >= {"pool", "distinct"}
