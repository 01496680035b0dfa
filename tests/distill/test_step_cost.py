"""The table of costs in the docs is the committed result, and covers everything that is registered and shipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.step_cost import FLOORS, in_all
from pocketvlm.distill.objectives import list_objectives
from pocketvlm.distill.recipe import list_recipes

EXCEPTIONS = {
    # another forward, or a match of tokens, by definition; hint's default share of places is there for its maps' cost
    "objective": {
        *("momentum", "masked-feature", "masked-language", "region-self", "token-alignment", "hint on all places"),
    },
    "recipe": {"self-distilled", "lightclip-mlm-style", "clipself", "filip-style"},
}
ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_costs_is_the_committed_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text(encoding="utf-8"))
    cost = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8").partition("## Cost")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (recipe )?`([\w-]+)`( on [a-z ]+)? \| (\S+) %", cost, re.M)
    shown = {kind + name + maps: value for kind, name, maps, value in rows}
    wanted = {name: row["share"] for name, row in result["objectives"].items()}
    wanted |= {f"recipe {name}": row["share"] for name, row in result["recipes"].items()}
    assert shown == {name: f"{100 * share:.1f}" for name, share in wanted.items()}
    named = " ".join(cost.partition("Above 5 %")[2].partition("\n\n")[0].split())
    for kind, floor in FLOORS.items():
        above = {name for name, row in result[f"{kind}s"].items() if in_all(row) > floor}
        assert above == set(result["above_floor"][kind]) == EXCEPTIONS[kind]
        assert all("`{}`{}{}".format(*name.partition(" ")) in named for name in above)
    for name, row in result["whole_steps"].items():
        assert f"`{name}` {100 * row['whole_steps']:.1f} %" in " ".join(cost.split())


def test_everything_has_a_cost() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text(encoding="utf-8"))
    absent = {*list_objectives(), "hint on maps"} - {*result["objectives"], *result["not_timed"]}
    absent |= {row["name"] for row in list_recipes()} - set(result["recipes"])
    assert not absent, f"run python -m benchmarks.step_cost again: {absent}"
