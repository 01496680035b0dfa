"""Options of objectives: what means nothing is refused, and what they mean is written down."""

from __future__ import annotations

import math
import re

import pytest
from objective_toys import build, outputs, total

from pocketvlm.distill.objectives import list_objectives, objective_class, objective_options
from pocketvlm.edge.errors import UsageError


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("feature", {"image": 0, "text": 0}, "both weights at 0"),
        ("feature", {"image": -1}, "'image' is -1 but must be a number from 0"),
        ("feature", {"text": math.inf}, "'text' is inf but must be a number from 0"),
        ("feature", {"text": math.nan}, "'text' is nan but must be a number from 0"),
        ("feature", {"image": "all"}, "'image' is 'all' but must be a number from 0"),
        ("feature", {"normalize": 1}, "'normalize' .* is 1 but must be true or false"),
        ("rkd", {"angle_rows": 2, "distance": 0}, "'angle_rows' is 2 but must be a whole number from 3"),
        ("rkd", {"angle_rows": 0}, "'angle_rows' is 0"),
        ("rkd", {"angle_rows": 8.0}, r"'angle_rows' is 8\.0"),
        ("rkd", {"angle_rows": True}, "'angle_rows' is True"),
        ("rkd", {"distance": -1}, "'distance' is -1"),
        ("rkd", {"angle": math.inf}, "'angle' is inf"),
        ("rankclip", {"cross": math.inf}, "'cross' is inf"),
        ("dho", {"label_weight": math.inf}, "'label_weight' is inf"),
        ("matryoshka-2d", {"kl": math.inf}, "'kl' is inf"),
        ("matryoshka-2d", {"detach": "no"}, "'detach' .* is 'no' but must be true or false"),
        ("matryoshka", {"weights": 2}, "'weights' .* is 2 but must be a list"),
        ("matryoshka", {"dims": (2,), "weights": (None,)}, "above 0"),
        ("siglip", {"bias": math.nan}, "'bias' is nan but must be a finite number"),
        ("siglip", {"bias": "x"}, "'bias' is 'x'"),
        ("siglip", {"bias": True}, "'bias' is True"),
        ("token-gram", {"student_prefix": -1}, "'student_prefix' is -1 but must be a whole number from 0"),
        ("token-gram", {"teacher_prefix": "one"}, "'teacher_prefix' is 'one'"),
        ("token-gram", {"temperature": None}, "'temperature' .* is null, which means nothing there"),
        ("hint", {"student_tap": "tokens", "places": "all"}, "places 'all' but takes a share"),
        ("hint", {"student_tap": "tokens", "places": True}, "places True but takes a share"),
        ("hycd", {"normalize": "maybe"}, "'normalize' .* is 'maybe' but must be true or false"),
        ("hycd", {"temperature": None}, "'temperature' .* is null"),
        ("dho", {"temperature": None}, "'temperature' .* is null"),
        ("multi-positive", {"epsilon": None}, "'epsilon' .* is null"),
        ("correlation-congruence", {"gamma": None}, "'gamma' .* is null"),
        ("gram", {"of": 5}, "'of' .* is 5 but must be a list"),
        ("multi-teacher", {"widths": "2+3"}, "'widths' .* must be a list"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, words):
    with pytest.raises(UsageError, match=words):
        build(name, **options)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_prefix_of_all_tokens_is_refused(side):
    for dropped in (9, 12):
        objective = build("token-gram", **{f"{side}_prefix": dropped})
        with pytest.raises(UsageError, match=f"drop the first {dropped} of the {side}'s 9 tokens"):
            total(objective, outputs(1), outputs(2))


@pytest.mark.parametrize("name", list_objectives())
def test_docstrings_state_formula_reduction_and_source(name):
    text = objective_class(name).__doc__
    assert text.startswith(f"{name}: ")
    wanted = ("Formula:", "Inputs:", "Output:", "Reduction:", "emperature", "Related:", "Cost:")
    assert [word for word in wanted if word not in text] == []
    assert "Paper:" in text or "This is our construction" in text
    # how long an embedding is, and which way a divergence runs
    assert re.search(r"normalis|x/\|x\||\bcos\b|cosine", text)
    assert "KL(" not in text or re.search(r"direction:", text, re.IGNORECASE)
    assert [option for option in objective_options(name) if not re.search(rf"\b{option}\b", text)] == []
