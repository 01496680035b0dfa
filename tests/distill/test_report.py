"""The report: one file without scripts or links, everything escaped, chosen without looking at the answers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.distill.curves import _ticks, line_chart
from pocketvlm.distill.evaluate import Embedded, Evaluation, Questions, score
from pocketvlm.distill.report import _title, write_report
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.edge.errors import UsageError

EVIL = "<script>alert('x')</script> & \"co\""


def make_run(folder: Path, name: str = "a run") -> tuple[Questions, Evaluation]:
    folder.mkdir()
    buffer = BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(buffer, "PNG")
    names = [EVIL, *(f"thing {i}" for i in range(19))]
    samples = [
        Sample(f"u{i}", ImageRef(data=buffer.getvalue()), (Caption(n),), label=n, tags={"category": "ab"[i % 2]})
        for i, n in enumerate(names)
    ]
    questions = Questions.of(samples, name="toy data", templates=("{}",))
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(20, 8)).astype(np.float32)
    place = {text: i for i, text in enumerate(names)}
    texts = vectors[[place[text] for text in questions.texts]]
    uids = [sample.uid for sample in samples]
    teacher = Embedded("teacher", "s", uids, vectors, texts)
    noisy = vectors + 0.9 * rng.normal(size=vectors.shape).astype(np.float32)
    evaluation = score(questions, Embedded("student", "s", uids, noisy, texts), teacher)
    (folder / "recipe.yaml").write_text(
        f"name: {name!r}\ndescription: {json.dumps(EVIL)}\nstudent: {{name: mnv4-050}}\n"
        "teacher: {spec: openmoji-lit}\ndata: {train: openmoji, eval: openmoji}\n"
    )
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "device": "cpu (1 threads)", "cuda": None}))
    always = {"samples_per_s": 50, "logit_scale": 14.0}
    rows = [
        {"step": s, "loss": 3 / s, "loss/crd": 2 / s, "loss/hint": 1 / s, "lr": 0.1, "grad_norm": 1.0} | always
        for s in range(1, 60)
    ]
    rows.insert(30, {"step": 30, "eval/image_to_text/R@5": 0.2})
    rows.append({"step": 59, "eval/image_to_text/R@5": 0.4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "lo')
    return questions, evaluation


VOID = ("meta", "img", "line", "polyline", "circle", "br")


class Tags(HTMLParser):
    """Counts of elements, and every address that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    questions, evaluation = make_run(tmp_path / "run")
    path = write_report(tmp_path / "run", questions, evaluation, licences=[("pictures", "CC BY-SA 4.0", "OpenMoji")])
    page = path.read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert "link" not in tags.seen
    assert all(address.startswith("data:image/webp;base64,") for address in tags.addresses)
    assert not re.search(r"https?://|url\(", page)
    assert EVIL not in page
    assert "&lt;script&gt;alert" in page
    assert tags.seen.count("article") == 12
    assert tags.seen.count("svg") == 6
    for expected in ("OpenMoji", "CC BY-SA 4.0", "prefers-color-scheme: dark", "By category", "Across models", "✓"):
        assert expected in page


def test_numbers_on_the_page_are_those_of_the_evaluation(tmp_path: Path) -> None:
    questions, evaluation = make_run(tmp_path / "run")
    page = write_report(tmp_path / "run", questions, evaluation).read_text()
    values = evaluation.values
    assert f"{100 * values['model']['image_to_text']['R@5']:.1f} %" in page
    assert f"{100 * values['retention']['image_to_text']['R@5']:.0f} %" in page
    # for each shown picture: the rank that was saved for it, and a tick exactly when it is among the five
    for name, side, rank, texts in re.findall(
        r'alt="([^"]+)">.*?<h3>(student) · rank (\d+)</h3><ol>(.*?)</ol>', page, flags=re.S
    ):
        if "thing" in name:
            row = evaluation.queries["image_to_text/uid"].tolist().index(f"u{int(name.split()[1]) + 1}")
            assert int(rank) == evaluation.queries["model/image_to_text/rank"][row], side
            assert ("✓" in texts) == (int(rank) <= 5)


def test_which_pictures_are_shown_does_not_depend_on_the_answers(tmp_path: Path) -> None:
    questions, evaluation = make_run(tmp_path / "run")
    first = re.findall(r'alt="([^"]+)"', write_report(tmp_path / "run", questions, evaluation, pictures=5).read_text())
    assert len(first) == 5
    evaluation.queries["model/image_to_text/rank"] = evaluation.queries["model/image_to_text/rank"][::-1].copy()
    again = re.findall(r'alt="([^"]+)"', write_report(tmp_path / "run", questions, evaluation, pictures=5).read_text())
    assert first == again


def test_without_an_evaluation_there_are_curves_only(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    assert "What it sees" not in page
    assert "<h2>Training</h2>" in page


def test_a_score_of_the_end_alone_has_no_chart_and_a_recorded_wait_has_one(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [row | {"data_wait_share": 0.1} for row in read_metrics(path) if row["step"] == 59 or "loss" in row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", write_report(tmp_path / "run").read_text())
    assert "Scores while training" not in titles
    assert "Data wait, share of a step" in titles


def test_the_page_names_the_shards_of_a_stream() -> None:
    recipe = {"name": "a", "data": {"train": "", "stream": {"shards": "pairs/{0..9}.tar"}}, "student": {"name": "s"}}
    assert _title(json.dumps(recipe))["data"] == "pairs/{0..9}.tar"
    recipe["data"] = {"train": "", "stream": {"shards": ["a.tar", "b.tar"]}}
    assert _title(json.dumps(recipe))["data"] == "a.tar, b.tar"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lacks recipe\.yaml, so it is not a run"):
        write_report(tmp_path)


def test_charts_survive_flat_empty_and_broken_series() -> None:
    assert line_chart("none", {"a": [(1, float("nan"))]}) is None
    flat = line_chart("flat", {"a": [(1, 2.0), (5, 2.0)], "b": [(3, 2.0)]})
    assert flat is not None
    assert "nan" not in flat.svg
    assert flat.svg.count("polyline") == 1
    assert flat.svg.count("<circle") == 1
    long = line_chart("long", {"a": [(i, i % 7) for i in range(5000)]}, smooth=True)
    assert long is not None
    assert all(len(points.split()) <= 240 for points in re.findall(r'points="([^"]+)"', long.svg))
    xs = [float(pair.split(",")[0]) for points in re.findall(r'points="([^"]+)"', long.svg) for pair in points.split()]
    assert 0 <= min(xs) < max(xs) <= 640


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.19), (-3, 800), (5, 5), (1e-7, 3e-7), (0, 0)])
def test_ticks_are_round_enclose_and_are_few(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
