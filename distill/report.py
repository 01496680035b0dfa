"""report.html: one file that explains a run to people; no script, no network, light and dark, desktop and phone."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.checkpoint import write_text_atomically
from pocketvlm.distill.curves import Chart, line_chart
from pocketvlm.distill.evaluate import Evaluation, Questions, gap_text, rows_of
from pocketvlm.distill.run_folder import ENVIRONMENT, METRICS, RECIPE, REPORT, read_metrics
from pocketvlm.edge.errors import BadSampleError, UsageError

PICTURES = 12
_THUMBNAIL = 160


def write_report(
    folder: Path,
    questions: Questions | None = None,
    evaluation: Evaluation | None = None,
    *,
    licences: Sequence[tuple[str, str, str]] = (),
    pictures: int = PICTURES,
) -> Path:
    """Write `report.html` into a run folder from its recipe, environment and metrics, and from an evaluation.

    questions, evaluation: of the final student; without them the report has curves but no table and no pictures.
    licences: (what, licence, attribution) of data and weights. pictures: how many queries are shown; which ones is
    decided by a hash of their uid, never by how well they were answered.

    Raises:
        UsageError: the folder is not a run.
    """
    try:
        recipe = (folder / RECIPE).read_text(encoding="utf-8")
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        rows = read_metrics(folder / METRICS)
    except OSError as error:
        raise UsageError(
            f"{folder} lacks {Path(str(error.filename)).name}, so it is not a run that can be reported; "
            "name a folder written by 'pocketvlm distill'"
        ) from error
    values = evaluation.values if evaluation else None
    page = (
        template_environment()
        .get_template("report.html.j2")
        .render(
            title=_title(recipe),
            cards=_cards(values, rows, environment),
            charts=_charts(rows),
            values=values,
            table=rows_of(values) if values else [],
            mixed=_mixed(values),
            tags=_tags(values),
            languages=_sides(values, "by_language"),
            flags=_sides(values, "flags"),
            pictures=_pictures(questions, evaluation, pictures) if questions and evaluation else [],
            recipe=recipe,
            environment=_facts(environment),
            licences=list(licences),
        )
    )
    write_text_atomically(folder / REPORT, page)
    return folder / REPORT


def template_environment(*packages: str) -> Any:
    """jinja2 environment over `templates/` of the given packages, then of this room (which holds the shared style)."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(package, "templates") for package in (*packages, "pocketvlm.distill")]
    return Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _title(recipe: str) -> dict[str, str]:
    import yaml

    value = yaml.safe_load(recipe)
    return {
        "name": value["name"],
        "description": value.get("description", ""),
        "student": value["student"]["name"],
        "teacher": (value.get("teacher") or {}).get("spec", ""),
        "data": _data(value["data"]),
        "test": value["data"].get("eval") or "",
    }


def _data(section: dict[str, Any]) -> str:
    if not section.get("stream"):
        return str(section["train"])
    shards = section["stream"]["shards"]
    return shards if isinstance(shards, str) else ", ".join(shards)


def _cards(
    values: dict[str, Any] | None, rows: list[dict[str, Any]], environment: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """(value, what, note) shown large at the top."""
    cards = []
    if values:
        for part, metric in (("image_to_text", "R@5"), ("text_to_image", "R@5"), ("zero_shot", "top-1")):
            own = values["model"].get(part)
            if own is None:
                continue
            teacher = (values.get("teacher") or {}).get(part, {}).get(metric)
            kept = ((values.get("retention") or {}).get(part) or {}).get(metric)
            note = f"chance {100 * min(1.0, int(metric[-1]) / own['gallery']):.1f} %"
            if teacher is not None:
                note = f"teacher {100 * teacher:.1f} %" + (f", {100 * kept:.0f} % kept" if kept is not None else "")
            cards.append((f"{100 * own[metric]:.1f} %", f"{part.replace('_', ' ')}, {metric}", note))
    trained = [row for row in rows if "loss" in row]
    if trained:
        speed = float(np.median([row["samples_per_s"] for row in trained]))
        cards.append((f"{trained[-1]['step']:,}", "steps", f"{speed:.0f} samples/s, {environment.get('device', '')}"))
    return cards


def _charts(rows: list[dict[str, Any]]) -> list[Chart]:
    trained = [row for row in rows if "loss" in row]
    scored = [row for row in rows if any(key.startswith("eval/") for key in row)]

    def series(source: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in source if key in row]

    terms = list(dict.fromkeys(key for row in trained for key in row if key.startswith("loss/")))
    # a score of the end alone is in the table
    whole = len({row["step"] for row in scored}) > 1
    recalls = [key for row in scored[:1] for key in row if whole and key.endswith(("R@5", "top-1"))]
    charts = [
        line_chart("Loss", {"loss": series(trained, "loss")}, smooth=True),
        line_chart("Terms, weighted", {key[5:]: series(trained, key) for key in terms}, smooth=True),
        line_chart(
            "Scores while training",
            {key[5:].replace("_", " ").replace("/", ", "): series(scored, key) for key in recalls},
        ),
        line_chart("Learning rate", {"lr": series(trained, "lr")}),
        line_chart("Gradient norm", {"gradient norm": series(trained, "grad_norm")}, smooth=True),
        line_chart("Logit scale", {"logit scale": series(trained, "logit_scale")}),
        line_chart("Data wait, share of a step", {"data wait": series(trained, "data_wait_share")}),
    ]
    return [chart for chart in charts if chart is not None]


def _mixed(values: dict[str, Any] | None) -> list[tuple[str, float, float]]:
    names = {
        "model_image_teacher_text": "student's pictures, teacher's texts",
        "teacher_image_model_text": "teacher's pictures, student's texts",
    }
    found = (values or {}).get("mixed") or {}
    return [
        (names[key], found[key]["image_to_text"]["R@5"], found[key]["text_to_image"]["R@5"])
        for key in names
        if found.get(key, {}).get("image_to_text")
    ]


def _tags(values: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for tag, rows in ((values or {}).get("by_tag") or {}).items():
        found[tag] = [
            {
                "name": name,
                "queries": int(sides["model"]["queries"]),
                "model": sides["model"]["R@5"],
                "teacher": sides["teacher"]["R@5"] if "teacher" in sides else None,
                "difference": gap_text("R@5", (sides.get("difference") or {}).get("R@5")),
            }
            for name, sides in sorted(rows.items(), key=lambda item: -item[1]["model"]["queries"])
        ]
    return found


def _sides(values: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    found = (values or {}).get(key) or {}
    if key == "flags":
        found = {"flags": found} if found else {}
    return [
        {
            "name": name,
            "queries": int(sides["model"]["image_to_text"]["queries"]),
            "model": sides["model"]["image_to_text"]["R@5"],
            "teacher": sides["teacher"]["image_to_text"]["R@5"] if sides.get("teacher") else None,
            "difference": gap_text("R@5", (sides.get("difference") or {}).get("R@5")),
        }
        for name, sides in found.items()
    ]


def _pictures(questions: Questions, evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    queries = evaluation.queries
    if "model/image_to_text/top" not in queries:
        return []
    samples = {sample.uid: sample for sample in questions.samples}
    texts = [str(text) for text in queries["text_to_image/text"]]
    sides = [side for side in ("teacher", "model") if f"{side}/image_to_text/top" in queries]
    order = sorted(
        range(len(queries["image_to_text/uid"])), key=lambda i: stable_hash(str(queries["image_to_text/uid"][i]))
    )
    shown = []
    for row in order:
        sample = samples[str(queries["image_to_text/uid"][row])]
        right = [c.text for c in sample.captions if c.language == questions.language]
        try:
            picture = thumbnail(sample.image.read())
        except BadSampleError:
            continue
        lists = [
            {
                "side": "student" if side == "model" else side,
                "rank": int(queries[f"{side}/image_to_text/rank"][row]),
                "top": [(texts[i], texts[i] in right) for i in queries[f"{side}/image_to_text/top"][row]],
            }
            for side in sides
        ]
        shown.append({"picture": picture, "right": right[0], "lists": lists})
        if len(shown) == count:
            break
    return shown


def thumbnail(data: bytes) -> str:
    """An encoded picture as a small WebP data URI."""
    from pocketvlm.edge.preprocess import decode_image

    image = Image.fromarray(decode_image(data))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    skip = ("licences", "data")
    flat = []
    for key, value in environment.items():
        if key in skip or value is None:
            continue
        if isinstance(value, dict):
            flat.append((key, ", ".join(f"{name} {item}" for name, item in value.items())))
        else:
            flat.append((key, str(value)))
    train = (environment.get("data") or {}).get("train") or {}
    if train:
        flat.append(("training pictures", f"{train['samples']}, {train['with_captions']} with captions"))
        if train["left_out"]["total"]:
            flat.append(("left out", ", ".join(f"{n} {why}" for why, n in train["left_out"]["counts"].items())))
    return flat
