"""The table of all objectives, made from their classes: `pocketvlm list objectives`, and the one in docs/objectives.md.

python -m pocketvlm.distill.objectives.table    # prints the latter
"""

from __future__ import annotations

from pocketvlm.distill.objectives import list_objectives, objective_class
from pocketvlm.distill.objectives.base import Needs

WRAPPERS = ("matryoshka", "matryoshka-2d")


def objective_rows() -> list[dict[str, str]]:
    """One row an objective, by name: formula, what it needs, the fewest rows that teach, paper.

    Needs and rows are those of the default options.
    """
    return [
        {
            "name": name,
            "formula": cls.formula,
            "needs": "the inner objective's" if name in WRAPPERS else _needs(cls.needs),
            "rows": "inner's" if name in WRAPPERS else str(cls.minimum_rows),
            "paper": cls.paper,
        }
        for name in list_objectives()
        for cls in [objective_class(name)]
    ]


def _needs(needs: Needs) -> str:
    asked = {
        "captions": needs.captions,
        "pooled features of both models": needs.features,
        "token maps of the teacher": "teacher_tap" in needs.taps,
        "token maps of the student": bool({"student_tap", "text_tap"} & set(needs.taps)),
        "a bank of texts": needs.bank,
        "a masked view": needs.masked_view,
        "masked captions": needs.masked_text,
        "cells of a student that does not start at random": needs.regions,
        "logits over the bank (`teacher.logits`)": needs.logits,
        "classes (`task`)": needs.classes,
        "`train.ema_decay`": needs.momentum,
        "no teacher": not needs.teacher,
    }
    return ", ".join(what for what, wanted in asked.items() if wanted) or "embeddings alone"


def markdown() -> str:
    """The rows as docs/objectives.md has them."""
    rows = objective_rows()
    lines = ["| name | loss | needs | rows | source |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"`{row['name']}`", *(row[key] for key in ("formula", "needs", "rows", "paper"))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
