"""The worked examples of docs/scaling.md, planned anew and pasted between its marks.

    python -m benchmarks.scaling_examples

One recipe at 10 thousand, 10 million and 1 billion pictures, by the constants of distill/devices.json; nothing of it
is timed here, so that the page is the same wherever it is made. A test plans them again and compares.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results_folder import write_text
from pocketvlm.distill.plan import Plan, make_plan
from pocketvlm.distill.recipe import load_recipe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- examples:begin -->", "<!-- examples:end -->"
# CLIP-KD's sum for a student from scratch, over stored answers to four views
COMMON = (
    "clip-kd student.name=mnv4-050 tokenizer.source=texts train.lr_scale={} "
    "student.fit_projection=null student.fit_text_projection=null train.cut_after_block=null train.hold_statistics=[] "
    "train.captioned_fraction=null teacher.cache_dtype=bfloat16 views.count=4"
)
STREAM = """data.train="''" data.stream.shards="pairs/{00000..99999}.tar" data.stream.workers=14"""
SIZES = {
    "10 k": "data.train=pairs.jsonl train.batch_size=256 --samples 1e4 --epochs 30 --device cpu --count 2",
    "10 M": f"{STREAM} train.batch_size=4096 --samples 1e7 --epochs 10 --device h100 --count 1",
    "1 B": f"{STREAM} train.batch_size=32768 --samples 1e9 --epochs 3 --device h100 --count 64",
}
LEFT_OUT = "cache, other dtype"


def planned(command: str) -> Plan:
    """The plan of one command line, as `pocketvlm plan` reads it."""
    words = shlex.split(command)
    first = next(place for place, word in enumerate(words) if word.startswith("--"))
    options = dict(zip(words[first::2], words[first + 1 :: 2]))
    return make_plan(
        load_recipe(words[0], words[1:first]),
        samples=float(options["--samples"]),
        epochs=float(options["--epochs"]),
        device=options["--device"],
        count=int(options["--count"]),
    )


def block() -> str:
    """What stands between the marks."""
    plans = {name: planned(f"{COMMON} {size}") for name, size in SIZES.items()}
    lines = ["```bash", f"common='{COMMON}'", *(f"pocketvlm plan $common {size}" for size in SIZES.values()), "```", ""]
    columns = [{row["quantity"]: row["value"] for row in plan.rows()} for plan in plans.values()]
    lines += [f"| | {' | '.join(plans)} |", f"|---|{'---:|' * len(plans)}"]
    for quantity in columns[0]:
        if quantity != LEFT_OUT:
            lines.append(f"| {quantity} | {' | '.join(column[quantity] for column in columns)} |")
    lines += [
        "",
        "What these plans take for granted, as the command prints it:",
        "",
        *_assumptions(list(plans.values())),
    ]
    return "\n".join(lines)


def _assumptions(plans: Sequence[Plan]) -> list[str]:
    rows = {(row["assumption"], row["value"], row["because"]): None for plan in plans for row in plan.assumptions}
    return ["| assumption | value | because |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, re.sub(f"{BEGIN}\n.*?{END}", lambda _: f"{BEGIN}\n{block()}\n{END}", text, flags=re.S))


if __name__ == "__main__":
    main()
