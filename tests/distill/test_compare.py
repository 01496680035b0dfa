"""`pocketvlm report`: what differs is shown and nothing else, intervals only where both were asked the same."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pocketvlm.cli import main
from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.distill.compare import compare, read_runs, write_comparison
from pocketvlm.distill.evaluate import Embedded, Questions, score
from pocketvlm.distill.metrics import paired_bootstrap
from pocketvlm.edge.errors import UsageError

EVIL = "<script>alert('x')</script>"
COUNT = 40


def recipe_of(**train: Any) -> dict[str, Any]:
    return {
        "name": "toy",
        "data": {"train": "openmoji", "eval": "openmoji"},
        "teacher": {"spec": "openmoji-lit"},
        "student": {"name": "mnv4-050"},
        "objectives": [{"name": "feature"}, {"name": "crd", "weight": 2.0}],
        "train": {"steps": 60, **train},
    }


def make_run(
    folder: Path, *, noise: float = 0.5, first: int = 0, recipe: dict[str, Any] | None = None, scored: bool = True,
    steps: int = 60, **environment: Any,
) -> Path:  # fmt: skip
    """A run whose student sees 40 named pictures, in groups of four, through so much noise."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe or recipe_of()))
    facts = {"commit": "a" * 40, "device": "cpu", "packages": {"torch": "2.14"}, "started": folder.name}
    (folder / "environment.json").write_text(json.dumps(facts | environment))
    rows = [
        {"step": s, "loss": 3 / s, "loss/crd": 2 / s, "lr": 0.1, "samples_per_s": 50 + s, "data_wait_s": 0.1}
        | {"step_s": 0.4, "skipped": s // 30, "elapsed_s": 2.0 * s, "rss_mb": 900.0 + s}
        for s in range(1, steps + 1)
    ]
    rows.insert(steps // 2, {"step": steps // 2, "eval/image_to_text/R@5": 0.2})
    rows.append({"step": steps, "eval/image_to_text/R@5": 0.4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if scored:
        names = [f"thing {i}" for i in range(first, first + COUNT)]
        samples = [
            Sample(f"u{name}", ImageRef(data=b""), (Caption(name),), label=name, group=f"g{i // 4}")
            for i, name in enumerate(names)
        ]
        questions = Questions.of(samples, name=f"toys from {first}", templates=("{}",))
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(COUNT, 8)).astype(np.float32)
        texts = vectors[[names.index(text) for text in questions.texts]]
        # one concept is seen well or badly as a whole, so that concepts matter
        shared = np.random.default_rng(1).normal(size=(COUNT // 4, 8)).repeat(4, axis=0)
        seen = (vectors + noise * (shared + rng.normal(size=vectors.shape))).astype(np.float32)
        own = Embedded("student", "s", [sample.uid for sample in samples], seen, texts)
        score(questions, own).save(folder)
    return folder


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not [key for key, _ in attrs if key in ("src", "href", "onload")]
        if tag not in ("meta", "line", "polyline", "circle", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "line", "polyline", "circle", "br", "wbr"):
            assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", noise=1.5, device=EVIL)]
    values = write_comparison(runs, tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "link", "img"} & set(tags.seen)
    assert not re.search(r"https?://|url\(", page)
    assert EVIL not in page
    assert "&lt;script&gt;alert" in page
    assert "prefers-color-scheme: dark" in page
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert {"Loss", "crd, weighted", "image to text, R@5, %", "Learning rate", "Samples per second"} <= set(titles)
    assert {"Data wait, % of a step", "Steps skipped"} <= set(titles)
    gap = values["runs"][1]["differences"]["image_to_text"]["R@1"]
    shown = f"{100 * gap['difference']:+.1f} ({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
    assert gap["high"] < 0
    assert f'<span class="gap worse">{shown}</span>' in page


def test_differences_are_paired_over_queries_and_resample_whole_concepts(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", noise=1.2)])
    found = compare(runs)["runs"]
    assert found[0]["differences"] == {}
    a, b = (run.evaluation.queries["model/image_to_text/rank"] for run in runs if run.evaluation)
    right = [float(y <= 5) - float(x <= 5) for x, y in zip(a, b)]
    gap = found[1]["differences"]["image_to_text"]["R@5"]
    assert gap["difference"] == pytest.approx(sum(right) / COUNT)
    assert gap["difference"] == pytest.approx(
        found[1]["scores"]["image_to_text"]["R@5"] - found[0]["scores"]["image_to_text"]["R@5"]
    )
    units = [i // 4 for i in range(COUNT)]
    expected = paired_bootstrap(b <= 5, a <= 5, clusters=units).to_dict()
    assert gap == pytest.approx(expected)
    alone = paired_bootstrap(b <= 5, a <= 5)
    assert (gap["low"], gap["high"]) != (alone.low, alone.high)
    assert {"R@1", "R@5", "R@10", "MAP"} == found[1]["differences"]["text_to_image"].keys()
    assert {"top-1", "top-5"} == found[1]["differences"]["zero_shot"].keys()
    assert found[1]["not_compared"] == {}


def test_a_run_beside_its_copy_differs_in_nothing(tmp_path: Path) -> None:
    values = write_comparison([make_run(tmp_path / "a"), make_run(tmp_path / "b")], tmp_path / "page.html")
    assert values["recipe"] == {}
    assert values["environment"] == {}
    gaps = [gap for part in values["runs"][1]["differences"].values() for gap in part.values()]
    assert {(gap["difference"], gap["low"], gap["high"]) for gap in gaps} == {(0.0, 0.0, 0.0)}
    page = (tmp_path / "page.html").read_text()
    assert "Nothing: the recipes are the same." in page
    assert 'class="gap better"' not in page


def test_other_evaluation_data_is_told_and_has_no_interval(tmp_path: Path) -> None:
    values = write_comparison([make_run(tmp_path / "a"), make_run(tmp_path / "b", first=10)], tmp_path / "page.html")
    assert values["runs"][1]["differences"] == {}
    reason = values["runs"][1]["not_compared"]["image_to_text"]
    assert reason == "other queries: 40 of toys from 10 here, 40 of toys from 0 there, 30 in both"
    page = (tmp_path / "page.html").read_text()
    assert "b is not comparable with a in image to text, text to image, zero shot (other queries" in page
    assert '<span class="gap' not in page


def test_another_gallery_is_no_same_question(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    path = runs[1] / "eval_queries.npz"
    with np.load(path) as arrays:
        changed = {key: arrays[key] for key in arrays.files}
    changed["text_to_image/text"] = np.array([f"{text}!" for text in changed["text_to_image/text"]])
    np.savez_compressed(path, **changed)
    found = compare(read_runs(runs))["runs"][1]
    assert found["not_compared"]["image_to_text"].startswith("other candidates: 40 of")
    assert found["differences"].keys() == {"zero_shot"}


def test_runs_that_saved_no_concepts_are_compared_query_by_query(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", noise=1.2)]
    path = runs[0] / "eval_queries.npz"
    with np.load(path) as arrays:
        np.savez_compressed(path, **{key: arrays[key] for key in arrays.files if not key.endswith("/unit")})
    gap = compare(read_runs(runs))["runs"][1]["differences"]["image_to_text"]["R@5"]
    assert gap["clusters"] == COUNT


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    other = recipe_of(lr=3e-4)
    other["objectives"] = [{"name": "crd", "weight": 3.0}, {"name": "icl", "weight": 0.5}, {"name": "feature"}]
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", recipe=other, packages={"torch": "2.15"}, commit=None)]
    values = compare(read_runs(runs))
    assert values["recipe"] == {
        "train.lr": [1e-3, 3e-4],
        "objectives.crd.weight": [2.0, 3.0],
        "objectives.icl": [None, "weight 0.5"],
    }
    assert values["environment"] == {"commit": ["a" * 12, None], "packages.torch": ["2.14", "2.15"]}


def test_an_older_recipe_does_not_differ_in_keys_that_came_later(tmp_path: Path) -> None:
    spelled = recipe_of(log_every=20, trackers=[])
    values = compare(read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", recipe=spelled)]))
    assert values["recipe"] == {}


def test_unfinished_unscored_and_damaged_runs_are_shown_as_such(tmp_path: Path) -> None:
    short = make_run(tmp_path / "short", scored=False, steps=30)
    broken = make_run(tmp_path / "broken")
    (broken / "eval_queries.npz").write_bytes(b"not a zip")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text(yaml.safe_dump(recipe_of()))
    values = write_comparison([make_run(tmp_path / "a"), short, broken, empty], tmp_path / "page.html")
    states = {run["name"]: (run["state"], run["step"], run["trouble"]) for run in values["runs"]}
    assert states["short"] == ("unfinished", 30, "no evaluation")
    assert states["broken"] == ("finished", 60, "its evaluation cannot be read")
    assert states["empty"] == ("not started", 0, "no evaluation")
    page = (tmp_path / "page.html").read_text()
    assert "unfinished, 30 of 60; no evaluation" in page
    assert "broken is not comparable with a (broken: its evaluation cannot be read)" in page
    assert values["runs"][0] | {"scores": 0} == {
        "name": "a", "state": "finished", "step": 60, "total": 60, "trouble": "", "loss": 0.05, "samples_per_s": 80.5,
        "data_wait_share": pytest.approx(0.25), "elapsed_s": 120.0, "rss_mb": 960.0, "skipped": 2, "device": "cpu",
        "data": "toys from 0", "scores": 0, "differences": {}, "not_compared": {},
    }  # fmt: skip


def test_a_run_keeps_its_colour_where_the_first_has_no_curve(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("loss/crd", None)
    (first / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_comparison([first, make_run(tmp_path / "b")], tmp_path / "page.html")
    chart = re.search(r"<figcaption>crd, weighted.*?</figure>", (tmp_path / "page.html").read_text(), re.S)
    assert chart is not None
    assert '<i class="s1"></i>b' in chart.group()


def test_runs_of_one_name_are_told_apart_without_naming_the_machine(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")])
    assert [run.name for run in runs] == ["x/run", "y/run"]
    write_comparison([tmp_path / "x" / "run", tmp_path / "y" / "run"], tmp_path / "page.html")
    assert str(tmp_path) not in (tmp_path / "page.html").read_text()


def test_one_run_is_summarised(tmp_path: Path) -> None:
    write_comparison([make_run(tmp_path / "a")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "report.html in its folder" in page
    assert "What differs" not in page
    assert "paired bootstrap" not in page
    assert "<h2>Scores</h2>" in page


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    with pytest.raises(UsageError, match=r"empty holds no readable recipe\.yaml, so it is not a run"):
        read_runs([run, tmp_path / "empty"])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "recipe.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="so it is not a run"):
        read_runs([tmp_path / "bad"])
    with pytest.raises(UsageError, match="was given twice"):
        read_runs([run, tmp_path / "." / "a"])
    with pytest.raises(UsageError, match="was given no run"):
        read_runs([])


def test_the_command_writes_a_page_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run(tmp_path / "a")), str(make_run(tmp_path / "b"))]
    page = tmp_path / "page.html"
    main(["report", *runs, "--out", str(page)])
    *table, last = capsys.readouterr().out.splitlines()
    assert last == f"report: {page}"
    rows = [line.split() for line in table if line.split()[:1] in (["a"], ["b"])]
    wanted = compare(read_runs([Path(run) for run in runs]))["runs"]
    for row, run in zip(rows, wanted, strict=True):
        assert row[:2] == [run["name"], run["state"]]
        assert f"{run['scores']['image_to_text']['R@5']:.1%}" in row
    assert page.read_text().startswith("<!doctype html>")
    main(["report", *runs, "--json"])
    assert json.loads(capsys.readouterr().out)["runs"][1]["name"] == "b"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "neither --out nor --json"),
        (["--out", "OUT/page.htm"], "does not end in .html"),
        (["--out", "OUT/there.html"], "exists and would be lost"),
    ],
)
def test_a_mistaken_command_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    (tmp_path / "there.html").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(make_run(tmp_path / "a")), *(part.replace("OUT", str(tmp_path)) for part in options)])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert (tmp_path / "there.html").read_text() == "mine"
