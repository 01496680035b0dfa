"""`pocketvlm report RUN ...`: runs beside each other, as one HTML page and as JSON.

Every run is compared with the first. A difference has an interval only where both were asked the same queries about the
same candidates: then it is the paired bootstrap of their per-query results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from pocketvlm.distill.checkpoint import write_text_atomically
from pocketvlm.distill.curves import Chart, line_chart
from pocketvlm.distill.evaluate import Array, Evaluation, gap_text, listed, show
from pocketvlm.distill.live import duration
from pocketvlm.distill.metrics import paired_bootstrap
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.report import template_environment
from pocketvlm.distill.run_folder import ENVIRONMENT, METRICS, RECIPE, read_metrics
from pocketvlm.edge.errors import UsageError

SCHEMA = "1.0"
# when and how a run was called, and what its recipe says better
_OF_ONE_RUN = ("started", "command", "recipe_sha256", "licences")


@dataclass
class Run:
    """A run folder as it lies there. rows: of its metrics.jsonl. evaluation: of the trained student, where there is
    one. trouble: why there is none, as a phrase."""

    name: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    evaluation: Evaluation | None
    trouble: str

    @property
    def trained(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total(self) -> int:
        train = self.recipe.get("train", {})
        return int(train.get("steps", 0)) + int(train.get("text_pretrain_steps", 0))

    @property
    def state(self) -> str:
        if not self.rows:
            return "not started"
        return "finished" if self.step >= self.total else "unfinished"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, finished or not.

    Raises:
        UsageError: no folder, one that holds no readable recipe.yaml, or the same one twice.
    """
    if not folders:
        raise UsageError("report was given no run, so there is nothing to show; name folders written by 'distill'")
    places = [folder.resolve() for folder in folders]
    if twice := {folder for folder, place in zip(folders, places) if places.count(place) > 1}:
        raise UsageError(f"{sorted(twice)[0]} was given twice, and a run does not differ from itself; name it once")
    return [_read(folder, name) for folder, name in zip(folders, _names(places))]


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return names


def _read(folder: Path, name: str) -> Run:
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        recipe = error
    if not isinstance(recipe, dict):
        raise UsageError(
            f"{folder} holds no readable {RECIPE}, so it is not a run that can be reported; name a folder written by "
            "'pocketvlm distill'"
        )
    with suppress(ValidationError):
        # with the defaults of keys that came later, so that an older run does not seem to differ in them
        recipe = Recipe.model_validate(recipe).to_dict()
    try:
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    rows = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    evaluation, trouble = None, ""
    try:
        evaluation = Evaluation.load(folder)
    except UsageError:
        trouble = "its evaluation cannot be read" if (folder / "eval.json").is_file() else "no evaluation"
    return Run(name, recipe, environment, rows, evaluation, trouble)


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """The comparison as a JSON tree: "runs" (state, speed, skipped steps, scores, differences from the first, why there
    is none), "recipe" and "environment" (key -> a value per run, of keys that differ)."""
    first = runs[0]
    found = []
    for run in runs:
        differences, why = ({}, {}) if run is first else _differences(first, run)
        scores: dict[str, dict[str, float]] = {}
        for part, metric, value in listed(run.evaluation.values) if run.evaluation else ():
            scores.setdefault(part, {})[metric] = value
        found.append(
            {
                "name": run.name,
                "state": run.state,
                "step": run.step,
                "total": run.total,
                "trouble": run.trouble,
                "loss": run.trained[-1]["loss"] if run.trained else None,
                "samples_per_s": _median(run.trained, "samples_per_s"),
                "data_wait_share": _wait(run.trained),
                "elapsed_s": next((row["elapsed_s"] for row in reversed(run.trained) if "elapsed_s" in row), None),
                "rss_mb": max((row["rss_mb"] for row in run.trained if "rss_mb" in row), default=None),
                "skipped": next((row["skipped"] for row in reversed(run.rows) if "skipped" in row), None),
                "device": run.environment.get("device"),
                "data": run.evaluation.values["data"]["name"] if run.evaluation else None,
                "scores": scores,
                "differences": differences,
                "not_compared": why,
            }
        )
    return {
        "schema": SCHEMA,
        "runs": found,
        "recipe": _differing(_recipes(runs)),
        "environment": _differing([_flat(_environment(run)) for run in runs]),
    }


def _median(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return float(np.median(values)) if values else None


def _wait(rows: Sequence[dict[str, Any]]) -> float | None:
    """Share of the logged steps' time that went by before their batch was there."""
    taken = sum(row["step_s"] for row in rows if "step_s" in row)
    return sum(row["data_wait_s"] for row in rows if "step_s" in row) / taken if taken else None


def _recipes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Recipes as flat keys, without prose; objectives under their names, so that another order or one more moves no
    other, and one that some run lacks is one key, with its weight."""
    flat, objectives = [], []
    for run in runs:
        flat.append({k: v for k, v in run.recipe.items() if k not in ("description", "objectives")})
        named: dict[str, dict[str, Any]] = {}
        for item in run.recipe.get("objectives") or []:
            name = item["name"] if item.get("batch", "pairs") == "pairs" else f"{item['name']}@{item['batch']}"
            while name in named:
                name += "'"
            named[name] = {key: value for key, value in item.items() if key not in ("name", "batch")}
        objectives.append(named)
    shared = set.intersection(*(set(named) for named in objectives))
    return [
        _flat(sections | {"objectives": {name: item for name, item in named.items() if name in shared}})
        | {
            f"objectives.{name}": f"weight {item.get('weight', 1.0):g}"
            for name, item in named.items()
            if name not in shared
        }
        for sections, named in zip(flat, objectives)
    ]


def _environment(run: Run) -> dict[str, Any]:
    """Versions, machine, commit, teacher; of the data, what and how much."""
    facts = {key: value for key, value in run.environment.items() if key not in _OF_ONE_RUN}
    if isinstance(commit := facts.get("commit"), str):
        facts["commit"] = commit[:12] + commit[40:]
    sides = ((name, side) for name, side in (facts.get("data") or {}).items() if side)
    told = ("name", "samples", "with_captions")
    return facts | {
        "data": {n: {k: side[k] for k in told if k in side} if isinstance(side, dict) else side for n, side in sides}
    }


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _flat(item, f"{where}.{key}" if where else str(key))
        return found
    return {where: value}


def _differing(runs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for run in runs for key in run)
    rows = {key: [run.get(key) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _differences(first: Run, run: Run) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Paired intervals of run - first by part and metric, and for each part without them the reason."""
    differences: dict[str, dict[str, Any]] = {}
    why: dict[str, str] = {}
    if first.evaluation is None or run.evaluation is None:
        return {}, {"all": f"{(first if first.evaluation is None else run).name}: {run.trouble or first.trouble}"}
    a, b = run.evaluation, first.evaluation
    for part, _, _ in listed(a.values):
        asked = _ASKED.get(part)
        if part in differences or part in why or asked is None or part not in b.values["model"]:
            continue
        if reason := _other_queries(part, asked, a, b):
            why[part] = reason
            continue
        # of runs before it was saved, every query stands for itself
        units = b.queries.get(f"{part}/unit")
        differences[part] = {
            metric: paired_bootstrap(own[rows], other[rows], clusters=None if units is None else units[rows]).to_dict()
            for metric, own, other, rows in _per_query(part, a, b)
            if metric in a.values["model"][part] and metric in b.values["model"][part]
        }
    return differences, why


# the arrays that say what was asked, of each part whose results are kept query by query
_ASKED = {
    "image_to_text": ("image_to_text/uid", "text_to_image/text"),
    "text_to_image": ("image_to_text/uid", "text_to_image/text"),
    "zero_shot": ("zero_shot/uid",),
    "hard_negatives": tuple(f"hard_negatives/{name}" for name in ("uid", "kind", "caption", "text")),
}


def _other_queries(part: str, asked: Sequence[str], a: Evaluation, b: Evaluation) -> str:
    for name in asked:
        own, other = a.queries.get(name), b.queries.get(name)
        if own is None or other is None:
            return f"{name} was not saved"
        if not np.array_equal(own, other):
            shared = len(set(own.tolist()) & set(other.tolist()))
            return f"other {'candidates' if name == 'text_to_image/text' else 'queries'}: {len(own)} of " + (
                f"{a.values['data']['name']} here, {len(other)} of {b.values['data']['name']} there, {shared} in both"
            )
    galleries = [side.values["model"][part].get("gallery") for side in (a, b)]
    return "" if galleries[0] == galleries[1] else f"{galleries[0]:.0f} candidates here, {galleries[1]:.0f} there"


def _per_query(part: str, a: Evaluation, b: Evaluation) -> Iterator[tuple[str, Array, Array, Any]]:
    """(metric, results of a, of b, which queries) of everything in a part that is a mean over queries."""
    every = slice(None)
    if part == "hard_negatives":
        kinds = b.queries["hard_negatives/kind"]
        for kind in sorted(set(kinds.tolist())):
            yield kind, a.queries["model/hard_negatives/right"], b.queries["model/hard_negatives/right"], kinds == kind
        return
    own, other = (side.queries[f"model/{part}/rank"] for side in (a, b))
    for metric, k in (("R@1", 1), ("R@5", 5), ("R@10", 10), ("top-1", 1), ("top-5", 5)):
        yield metric, own <= k, other <= k, every
    if f"model/{part}/ap" in a.queries and f"model/{part}/ap" in b.queries:
        yield "MAP", a.queries[f"model/{part}/ap"], b.queries[f"model/{part}/ap"], every


def write_comparison(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the page of `compare(read_runs(folders))` to `out`; returns what it shows. Errors as `read_runs`."""
    runs = read_runs(folders)
    values = compare(runs)
    page = (
        template_environment()
        .get_template("compare.html.j2")
        .render(
            title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
            values=values,
            runs=[_summary(run) for run in values["runs"]],
            scores=_scores(values["runs"]),
            notes=_notes(values["runs"]),
            charts=_charts(runs),
            recipe={key: [_text(value) for value in row] for key, row in values["recipe"].items()},
            environment={key: [_text(value) for value in row] for key, row in values["environment"].items()},
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out, page)
    return values


def _text(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _summary(run: dict[str, Any]) -> dict[str, str]:
    def said(key: str, form: str, factor: float = 1) -> str:
        return "–" if run[key] is None else format(factor * run[key], form)

    state = run["state"] if run["state"] == "finished" else f"{run['state']}, {run['step']:,} of {run['total']:,}"
    return {
        "name": run["name"],
        "state": "; ".join(filter(None, (state, run["trouble"]))),
        "steps": f"{run['step']:,}",
        "loss": said("loss", ".4f"),
        "speed": said("samples_per_s", ",.0f"),
        "wait": said("data_wait_share", ".1f", 100),
        "elapsed": "–" if run["elapsed_s"] is None else duration(run["elapsed_s"]),
        "memory": said("rss_mb", ".2f", 1e-3),
        "skipped": said("skipped", ",.0f"),
        "device": run["device"] or "–",
    }


def _scores(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, str]]]]:
    """(part, metric, a cell per run: "value", "gap", "css") of every metric that some run has."""
    keys = dict.fromkeys((part, metric) for run in runs for part, row in run["scores"].items() for metric in row)
    table = []
    for part, metric in sorted(keys, key=lambda key: list(dict.fromkeys(k[0] for k in keys)).index(key[0])):
        cells = []
        for run in runs:
            gap = run["differences"].get(part, {}).get(metric)
            css = "" if gap is None else "better" if gap["low"] > 0 else "worse" if gap["high"] < 0 else ""
            text = "" if gap is None else gap_text(metric, gap)
            cells.append({"value": show(metric, run["scores"].get(part, {}).get(metric)), "gap": text, "css": css})
        table.append((part.replace("_", " "), metric.replace("_", " "), cells))
    return table


def _notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    for run in runs[1:]:
        if reason := run["not_compared"].get("all"):
            notes.append(f"{run['name']} is not comparable with {runs[0]['name']} ({reason}).")
            continue
        for reason in dict.fromkeys(run["not_compared"].values()):
            parts = ", ".join(part.replace("_", " ") for part, why in run["not_compared"].items() if why == reason)
            notes.append(f"{run['name']} is not comparable with {runs[0]['name']} in {parts} ({reason}).")
    return notes


def _charts(runs: Sequence[Run]) -> list[Chart]:
    def each(key: str, *, scale: float = 1) -> dict[str, list[tuple[float, float]]]:
        return {run.name: [(row["step"], scale * row[key]) for row in run.rows if key in row] for run in runs}

    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    terms = [key for key in keys if key.startswith("loss/")]
    recalls = [key for key in keys if key.startswith("eval/") and key.endswith(("R@5", "top-1"))]
    # the scores of the end alone are in the table
    recalls = [key for key in recalls if any(len(points) > 1 for points in each(key).values())]
    wait = {
        run.name: [(r["step"], 100 * r["data_wait_s"] / max(r["step_s"], 1e-9)) for r in run.trained if "step_s" in r]
        for run in runs
    }
    charts = [
        line_chart("Loss", each("loss"), smooth=True),
        *(line_chart(f"{key[5:]}, weighted", each(key), smooth=True) for key in terms),
        *(line_chart(f"{key[5:].replace('_', ' ').replace('/', ', ')}, %", each(key, scale=100)) for key in recalls),
        line_chart("Learning rate", each("lr")),
        line_chart("Gradient norm", each("grad_norm"), smooth=True),
        line_chart("Samples per second", each("samples_per_s"), smooth=True),
        line_chart("Data wait, % of a step", wait, smooth=True),
        line_chart("Memory of the process, MB", each("rss_mb")),
        line_chart("Steps skipped", each("skipped")),
    ]
    return [chart for chart in charts if chart is not None]
