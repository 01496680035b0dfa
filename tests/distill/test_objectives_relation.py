"""Objectives over orders, kernels, token maps and prefixes, against plain loops; and their manners.

The general manners are those of test_objectives.py, whose tests are run here on these objectives' cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import test_objectives as base
import torch
from objective_toys import OTHER, WIDTHS, B, D, F, build, captioned, cosine, outputs, rows, softmax, total, unit

from pocketvlm.distill.objectives import (
    Outputs,
    Widths,
    build_objective,
    list_objectives,
    objective_needs,
)
from pocketvlm.distill.objectives.matryoshka import prefix
from pocketvlm.distill.objectives.ranking import list_mle
from pocketvlm.distill.objectives.token_gram import common_tokens
from pocketvlm.edge.errors import UnknownNameError, UsageError

# ------------------------------------------------------------------------------------------------ oracles


def mle(scores: list[float], order_by: list[float], top: int | None = None) -> float:
    """Plackett-Luce by sets: an item competes with all that are not clearly ahead of it."""
    count, value = len(scores), 0.0
    for k in range(count):
        ahead = [m for m in range(count) if order_by[m] > order_by[k] + 1e-6]
        group = [m for m in range(count) if abs(order_by[m] - order_by[k]) <= 1e-6]
        left = (count if top is None else top) - len(ahead)
        share = min(max(left, 0) / len(group), 1.0)
        rivals = [scores[m] for m in range(count) if m not in ahead]
        value += share * (math.log(math.fsum(math.exp(x - max(rivals)) for x in rivals)) + max(rivals) - scores[k])
    return value


def grid(a: list, b: list) -> list[list[float]]:
    return [[cosine(x, y) for y in b] for x in a]


def turned(matrix: list) -> list:
    return [list(column) for column in zip(*matrix)]


def rankclip_oracle(o, s, t):
    image, text, _ = captioned(s)
    c = 1 / o.temperature if o.temperature else float(s.logit_scale)
    lists = {"cross": (grid(image, text), turned(grid(image, text))), "within": (grid(image, image), grid(text, text))}
    value, n = 0.0, len(image)
    for key, pair in lists.items():
        for x, y in (pair, pair[::-1]):
            for i in range(n):
                value += getattr(o, key) * mle([c * a for a in x[i]], y[i]) / n / n
    return value / 32 if o.reduction == "released" else value


def kernel(x, y, gamma: float, order: int) -> float:
    dot = cosine(x, y)
    return math.fsum(
        math.exp(-2 * gamma) * (2 * gamma * dot) ** p / math.prod(range(1, p + 1)) for p in range(order + 1)
    )


def correlation_oracle(o, s, t):
    def one(x, y):
        n = len(x)
        pairs = list(itertools.product(range(n), repeat=2))
        k = [kernel(x[i], x[j], o.gamma, o.order) - kernel(y[i], y[j], o.gamma, o.order) for i, j in pairs]
        return math.fsum(d * d for d in k) / n**2

    value = one(rows(s.image), rows(t.image)) if "image" in o.of else 0.0
    return value + (one(captioned(s)[1], captioned(t)[1]) if "text" in o.of else 0.0)


def order_oracle(o, s, t):
    tau = o.temperature or 1 / float(s.logit_scale)
    (s_image, s_text, _), (t_image, t_text, _) = captioned(s), captioned(t)
    searches = {
        "image": (rows(s.image), rows(s.image), rows(t.image), rows(t.image)),
        "text": (s_text, s_text, t_text, t_text),
        "image-to-text": (s_image, s_text, t_image, t_text),
        "text-to-image": (s_text, s_image, t_text, t_image),
    }
    value = 0.0
    for part in o.of:
        query, gallery, t_query, t_gallery = searches[part]
        for i in range(len(query)):
            candidates = [j for j in range(len(gallery)) if j != i or "-" in part]
            k = min(o.neighbours, len(candidates) - 1)
            ours = [cosine(query[i], gallery[j]) / tau for j in candidates]
            value += mle(ours, [cosine(t_query[i], t_gallery[j]) for j in candidates], k) / k / len(query)
    return value


def token_oracle(o, s, t):
    value = 0.0
    for x, y in zip(rows(s.taps["tokens"]), rows(t.taps["tokens"])):
        if o.normalize:
            x, y = [unit(v) for v in x], [unit(v) for v in y]
        a, b = ([[math.fsum(p * q for p, q in zip(u, v)) for v in z] for u in z] for z in (x, y))
        if o.variant == "rdist":
            value += (1 - cosine([v for row in a for v in row], [v for row in b for v in row])) / B
            continue
        for ours, theirs in zip(a, b):
            q, p = (softmax([(v - min(r)) / (max(r) - min(r)) / o.temperature for v in r]) for r in (ours, theirs))
            value -= math.fsum(u * math.log(v) for u, v in zip(p, q)) / len(a) / B
    return value


def matryoshka_oracle(o, s, t):
    """By the inner objective's own oracle on tensors cut here."""
    value = 0.0
    for m, weight, inner in zip(o.dims, o.weights, o.inners):
        cut = dataclasses.replace(s, image=s.image[:, :m], text=s.text[:, :m], bank=s.bank[:, :m])
        wanted = t
        if inner.name in ("feature", "vl2v") and t.image.shape[1] == D:
            wanted = dataclasses.replace(t, image=t.image[:, :m], text=t.text[:, :m])
        oracle = {name: found for name, found, _ in [*base.CASES, *CASES]}[inner.name]
        value += weight * oracle(inner, cut, wanted)
    return value


CASES = [
    ("rankclip", rankclip_oracle, {}),
    ("rankclip", rankclip_oracle, {"reduction": "released", "cross": 2.0, "within": 0.5, "temperature": 0.2}),
    ("rankclip", rankclip_oracle, {"cross": 0.0}),
    ("correlation-congruence", correlation_oracle, {}),
    ("correlation-congruence", correlation_oracle, {"of": ("image", "text"), "gamma": 1.1, "order": 4}),
    ("order", order_oracle, {}),
    ("order", order_oracle, {"neighbours": 2, "of": ("image", "text", "image-to-text", "text-to-image")}),
    ("order", order_oracle, {"neighbours": 1, "of": "text", "temperature": 0.3}),
    ("order", order_oracle, {"of": ("image-to-text", "text-to-image"), "temperature": None}),
    ("token-gram", token_oracle, {}),
    ("token-gram", token_oracle, {"normalize": True}),
    ("token-gram", token_oracle, {"variant": "scd", "normalize": True}),
    ("token-gram", token_oracle, {"variant": "scd", "temperature": 0.5}),
    ("matryoshka", matryoshka_oracle, {}),
    ("matryoshka", matryoshka_oracle, {"dims": (2, 3, 5), "weights": (0.5, 1.0, 2.0)}),
    ("matryoshka", matryoshka_oracle, {"dims": (3, 5), "inner": {"name": "feature", "options": {"distance": "l2"}}}),
    ("matryoshka", matryoshka_oracle, {"dims": (3, 5), "inner": {"name": "clip"}}),
    ("matryoshka", matryoshka_oracle, {"dims": (4,), "inner": {"name": "icl", "options": {"logit_scale": 3.0}}}),
    ("matryoshka", matryoshka_oracle, {"inner": {"name": "bank", "options": {"anchors": "teacher"}}}),
    ("matryoshka", matryoshka_oracle, {"inner": {"name": "order"}, "dims": (3, 5)}),
    ("matryoshka", matryoshka_oracle, {"inner": {"name": "vl2v"}, "dims": (3, 5)}),
]


def label(options: dict) -> str:
    return "-".join(f"{k}={v['name'] if k == 'inner' else v}" for k, v in options.items()) or "default"


every_case = pytest.mark.parametrize(
    ("name", "oracle", "options"), CASES, ids=[f"{name}-{label(options)}" for name, _, options in CASES]
)


def reads(name: str, options: dict) -> tuple[bool, bool]:
    """Whether a case reads pictures, and captions."""
    if name == "matryoshka":
        inner = options.get("inner", {"name": "crd"})
        return True, inner["name"] in ("crd", "clip", "icl", "feature")
    of = options.get("of", "image")
    parts = (of,) if isinstance(of, str) else of
    return name != "order" or parts != ("text",), name == "rankclip" or any("text" in part for part in parts)


# ------------------------------------------------------------------------------------------------ general manners


@every_case
def test_value_equals_the_loop_oracle(name, oracle, options):
    base.test_value_equals_the_loop_oracle(name, oracle, options)


@every_case
def test_value_with_another_teacher_width(name, oracle, options):
    if options.get("inner", {}).get("name") != "clip":
        base.test_value_with_another_teacher_width(name, oracle, options)


@every_case
def test_float32_and_bfloat16_are_close(name, oracle, options):
    base.test_float32_and_bfloat16_are_close(name, oracle, options)


@pytest.mark.parametrize(("name", "oracle", "options"), base.taught(CASES))
def test_teacher_and_student_are_not_interchangeable(name, oracle, options):
    objective, a, b = build(name, **options), outputs(1), outputs(2)
    forward, backward = float(total(objective, a, b)), float(total(objective, b, a))
    # distances are symmetric by definition, only their gradients are not
    symmetric = name == "correlation-congruence" or (name == "token-gram" and objective.variant == "rdist")
    symmetric |= options.get("inner", {}).get("name") == "feature"
    assert (forward == pytest.approx(backward, rel=1e-9)) == symmetric


@every_case
def test_perfect_student_is_a_minimum(name, oracle, options):
    """Where the loss is a distance or a divergence; the likelihood of an order grows with the gaps for ever."""
    inner = options.get("inner", {"name": "crd"})["name"]
    if name in ("rankclip", "order") or (name == "matryoshka" and inner != "feature"):
        return
    student, teacher = outputs(2, grad=True), outputs(2)
    value = total(build(name, **options), student, teacher)
    value.backward()
    if options.get("variant") != "scd":
        assert float(value) == pytest.approx(0.0, abs=1e-12)
    for part in (student.image, student.text, student.taps["tokens"]):
        if part.grad is not None:
            assert part.grad.abs().max() < 1e-8


@every_case
def test_gradients_are_right_and_reach_only_the_student(name, oracle, options):
    objective = build(name, **options).double()
    student, teacher = outputs(1, grad=True), outputs(2, grad=True)
    # the token map's right side is detached in scd: what is differentiated there is not what is computed
    leaves = [student.image, student.text, student.bank, student.logit_scale]
    leaves += [] if options.get("variant") == "scd" else [student.taps["tokens"]]

    def value(image, text, bank, scale, tokens=student.taps["tokens"]):
        given = dataclasses.replace(
            student, image=image, text=text, bank=bank, logit_scale=scale, taps={"tokens": tokens}
        )
        return total(objective, given, teacher)

    assert torch.autograd.gradcheck(value, tuple(leaves), eps=1e-6, atol=1e-6, fast_mode=True)
    value(*leaves).backward()
    for part in (teacher.image, teacher.text, teacher.bank, teacher.logit_scale, teacher.taps["tokens"]):
        assert part.grad is None
    trained = [part.grad for part in (student.image, student.text, student.taps["tokens"])]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters() if p.numel() > 1)


@every_case
def test_trained_parts_are_the_ones_that_the_formula_names(name, oracle, options):
    objective, student = build(name, OTHER, **options), outputs(1, grad=True)
    total(objective, student, outputs(2, dim=OTHER.embedding, features=OTHER.image_features)).backward()
    image, text = reads(name, options)
    inner = options.get("inner", {"name": "crd"})["name"] if name == "matryoshka" else name
    own_scale = inner in ("clip", "crd", "bank") or (
        inner in ("rankclip", "order") and objective_option(objective, "temperature") is None
    )
    wanted = {
        "image": image and name != "token-gram",
        "text": text and name != "token-gram",
        "tokens": name == "token-gram",
        "logit_scale": own_scale,
    }
    parts = {"image": student.image, "text": student.text, "logit_scale": student.logit_scale} | student.taps
    found = {key: parts[key].grad is not None and bool(parts[key].grad.abs().sum() > 0) for key in wanted}
    assert found == wanted


def objective_option(objective, key):
    return getattr(objective.inners[0] if objective.name == "matryoshka" else objective, key)


@every_case
def test_rows_without_caption_are_ignored(name, oracle, options):
    base.test_rows_without_caption_are_ignored(name, oracle, options)


@every_case
@pytest.mark.parametrize("how", ["mask", "no-text", "one"])
def test_batch_without_captions_is_zero_with_a_graph(name, oracle, options, how):
    objective, student, teacher = build(name, **options), outputs(1, grad=True), outputs(2)
    if how == "no-text":
        student = dataclasses.replace(student, text=None, has_text=None)
    else:
        student.has_text = torch.tensor([how == "one"] + [False] * (B - 1))
    terms = objective(student=student, teacher=teacher if objective.needs.targets else None)
    assert all(math.isfinite(float(value)) for value in terms.values())
    sum(terms.values()).backward()
    images_too = options.get("inner", {}).get("name") == "vl2v"  # whose picture term needs no caption
    if objective.needs.captions and not images_too:
        assert {float(value) for value in terms.values()} == {0.0}
        assert student.image.grad.abs().max() == 0
        assert all(parameter.grad is not None for parameter in objective.parameters())
    for key, value in terms.items():
        if "text" in key and not (how == "one" and ("feature" in key or images_too)):
            assert float(value) == 0.0


def cut(o: Outputs, keep) -> Outputs:
    """The rows `keep`; the bank is no row."""
    keys = ("image", "text", "has_text", "image_features", "text_features", "group", "masked_image", "text_mask")
    keys += ("masked_words", "masked_pieces", "regions", "region_targets", "region_mask", "top_logits", "top_ids")
    changed = {key: getattr(o, key)[keep] for key in keys}
    return dataclasses.replace(o, **changed, taps={k: v[keep] for k, v in o.taps.items()})


def test_batch_of_one_is_refused_where_rows_are_compared():
    least = {"rankclip": 2, "correlation-congruence": 2, "order": 3, "token-gram": 1, "matryoshka": 2}
    assert set(least) == {name for name, _, _ in CASES}
    for name, enough in least.items():
        student, teacher = outputs(1), outputs(2)
        assert float(total(build(name), cut(student, slice(enough)), cut(teacher, slice(enough)))) > 0, name
        for n in range(1, enough):
            with pytest.raises(UsageError, match=f"batch of {n} .*identically zero.*at least {enough}"):
                total(build(name), cut(student, slice(n)), cut(teacher, slice(n)))
    crossed = build("order", of=("image-to-text", "text-to-image"))
    assert float(total(crossed, cut(outputs(1), slice(2)), cut(outputs(2), slice(2)))) > 0


# what an objective may read of a student, taps and scales apart
READ = (
    "image", "text", "bank", "image_features", "text_features", "masked_image", "masked_words", "token_table",
    "regions", "region_targets", "class_logits", "taught_logits",
)  # fmt: skip
# of everything here and in test_objectives.py, with all options that have an oracle
EVERYTHING = [(name, options) for name, _, options in [*base.CASES, *CASES]]
every_objective = pytest.mark.parametrize(
    ("name", "options"), EVERYTHING, ids=[f"{name}-{label(options)}" for name, options in EVERYTHING]
)


@every_objective
def test_order_of_the_rows_changes_nothing(name, options):
    """A batch is a set. Duplicate captions (rows 0 and 3) tie in every order."""
    if name == "rafa" or "angle_rows" in options:
        return  # by definition: a random point belongs to a place in the batch; only the first rows have angles
    # `widths` must add up to the teacher's, and an average is as wide as its student
    widths = WIDTHS if "widths" in options or objective_needs(name, options).momentum else OTHER
    objective = build(name, widths, **options)
    student, teacher = outputs(1), outputs(2, dim=widths.embedding, features=widths.image_features)
    wanted = float(total(objective, student, teacher))
    for turn in ([5, 3, 1, 0, 4, 2], [3, 1, 2, 0, 4, 5], [2, 4, 0, 3, 5, 1]):
        assert float(total(objective, cut(student, turn), cut(teacher, turn))) == pytest.approx(wanted, rel=1e-10)


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_range_of_half_precision_is_enough(name, options, dtype):
    """At a logit scale of 100 and outputs of size 200, values and gradients are finite: with two models that agree,
    with two that contradict each other, and with captions exactly on their pictures, but one exactly opposite."""
    for how in ("agree", "contradict", "aligned"):
        sign = -1.0 if how == "contradict" else 1.0
        student, teacher = outputs(1), outputs(1)
        with torch.no_grad():
            for side, factor in ((student, 200.0 * sign), (teacher, 200.0)):
                for key in READ:
                    setattr(side, key, (getattr(side, key) * factor).to(dtype))
                side.taps = {key: (value * factor).to(dtype) for key, value in side.taps.items()}
                side.logit_scale = torch.tensor(100.0, dtype=dtype)
                if how == "aligned":
                    side.text = side.image.clone()
                    side.text[1] *= -1
            teacher.text = teacher.text * sign
        leaves = [*(getattr(student, key) for key in READ), student.logit_scale, *student.taps.values()]
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = total(build(name, **options), student, teacher)
        value.backward()
        assert torch.isfinite(value), (name, how)
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert found, (name, how)
        assert all(torch.isfinite(gradient).all() for gradient in found), (name, how)


VARIANTS = [
    *((name, {}) for name in list_objectives()),
    ("token-gram", {"variant": "scd"}),
    ("token-gram", {"normalize": True}),
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{label(o)}" for n, o in VARIANTS])


@every_variant
@pytest.mark.parametrize("noise", [0.0, 1e-12])
def test_equal_rows_give_finite_gradients(name, options, noise):
    """A collapsed student, of every registered objective, exactly and up to rounding, in all that it reads: equal rows,
    and equal places, words, masked places and cells in each."""
    student, g = outputs(1, grad=True), torch.Generator().manual_seed(0)
    tokens = student.taps["tokens"]
    collapsed = [getattr(student, key) for key in READ if key not in ("bank", "token_table", "region_targets")]
    collapsed += student.taps.values()
    with torch.no_grad():
        for part in collapsed:
            part[:] = part[0].clone() if part.ndim == 2 else 1.0
            part += noise * torch.randn(part.shape, generator=g)
    total(build(name, **options), student, outputs(2)).backward()
    found = [part.grad for part in collapsed if part.grad is not None]
    assert found
    assert all(torch.isfinite(gradient).all() for gradient in found)
    assert tokens.grad is None or tokens.grad.abs().max() < 10


@pytest.mark.parametrize("options", [{}, {"variant": "scd"}, {"normalize": True}])
def test_dead_tokens_are_no_accident(options):
    student = outputs(1, grad=True)
    with torch.no_grad():
        student.taps["tokens"].zero_()
    value = total(build("token-gram", **options), student, outputs(2))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.taps["tokens"].grad).all()


# ------------------------------------------------------------------------------------------------ rankings


def test_list_mle_is_the_likelihood_of_an_order():
    """Over all orders of four items the likelihoods sum to 1, and drawing the first two is a distribution too."""
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.7]], dtype=torch.float64)
    for top, count in ((None, 1), (4, 1), (2, 2)):
        mass = 0.0
        for order in itertools.permutations(range(4)):
            places = torch.tensor([[-float(order.index(item)) for item in range(4)]], dtype=torch.float64)
            mass += math.exp(-float(list_mle(scores, places, top=top)))
        assert mass == pytest.approx(count, rel=1e-12)  # every first two occur in two orders of four


def test_tied_items_share_a_place():
    scores = torch.tensor([[1.0, -0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    tied = torch.tensor([[0.5, 0.5 + 1e-8, 0.1]], dtype=torch.float64)
    both = math.log(sum(math.exp(x) for x in (1.0, -0.5, 0.2)))
    assert float(list_mle(scores, tied).detach()) == pytest.approx(2 * both - 1.0 + 0.5, rel=1e-12)
    assert float(list_mle(scores, tied, top=1).detach()) == pytest.approx(both - 0.25, rel=1e-12)
    torch.testing.assert_close(list_mle(scores[:, [1, 0, 2]], tied), list_mle(scores, tied))


def test_order_takes_only_the_order_from_the_teacher():
    """Any increasing function of the teacher's cosines teaches the same; a perfect order still gains by gaps."""
    ours = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theirs = torch.rand(5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(list_mle(ours, theirs, top=3), list_mle(ours, torch.exp(5 * theirs), top=3))
    places = theirs.argsort(-1).argsort(-1).double()
    assert (list_mle(4 * places, theirs, top=3) < list_mle(places, theirs, top=3)).all()
    wrong = theirs.clone()
    wrong[:, [0, 1]] = wrong[:, [1, 0]]
    assert (list_mle(places, wrong) > list_mle(places, theirs)).all()


def test_order_beyond_the_batch_is_all_of_it():
    wanted = float(total(build("order", neighbours=B - 2), outputs(1), outputs(2)))
    assert float(total(build("order", neighbours=500), outputs(1), outputs(2))) == wanted


def test_rankclip_as_released_is_a_thirty_second():
    values = [float(total(build("rankclip", reduction=r), outputs(1), outputs(1))) for r in ("mean", "released")]
    assert values[0] == pytest.approx(32 * values[1], rel=1e-12)


def test_rankclip_sees_the_end_of_a_list_at_scale_100():
    """With a constant inside the logarithm, as released, items far below the best would have no gradient."""
    scores = torch.tensor([[100.0, 10.0, -20.0]], requires_grad=True)
    value = list_mle(scores, torch.tensor([[3.0, 1.0, 2.0]]))
    value.backward(torch.ones_like(value))
    assert float(value.detach()) == pytest.approx(30.0, rel=1e-6)
    assert scores.grad[0].tolist() == pytest.approx([0.0, 1.0, -1.0], abs=1e-6)


# ------------------------------------------------------------------------------------------------ kernels


def test_correlation_series_tends_to_the_gaussian():
    student, teacher = outputs(1), outputs(2)

    def gaussian(z):
        return torch.exp(-0.4 * torch.cdist(z, z).square())

    z = [torch.nn.functional.normalize(o.image, dim=-1) for o in (student, teacher)]
    wanted = float((gaussian(z[0]) - gaussian(z[1])).square().mean())
    found = float(total(build("correlation-congruence", order=20), student, teacher))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_first_order_correlation_is_a_scaled_cosine_gram():
    """Said in the docstring, so true."""
    factor = (0.8 * math.exp(-0.8)) ** 2
    found = float(total(build("correlation-congruence", order=1), outputs(1), outputs(2)))
    assert found == pytest.approx(factor * float(total(build("gram"), outputs(1), outputs(2))), rel=1e-12)


# ------------------------------------------------------------------------------------------------ token maps


def maps(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_feature_map_is_its_tokens():
    chart = maps((2, 5, 3, 4))
    by_hand = torch.stack([chart[:, :, y, x] for y in range(3) for x in range(4)], dim=1)
    found, same = common_tokens(chart, by_hand)
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(same, by_hand)


def test_unequal_grids_are_averaged_to_the_smaller():
    student, teacher = maps((2, 5, 2, 2)), maps((2, 16, 3), seed=1)
    found, pooled = common_tokens(student, teacher)
    assert found.shape == (2, 4, 5)
    for y, x in itertools.product(range(2), repeat=2):
        cells = [4 * (2 * y + a) + 2 * x + b for a, b in itertools.product(range(2), repeat=2)]
        torch.testing.assert_close(pooled[:, 2 * y + x], teacher[:, cells].mean(dim=1))
    wide, tall = common_tokens(maps((1, 2, 2, 4)), maps((1, 3, 4, 2)))  # eight tokens each, in other places
    assert wide.shape[1] == tall.shape[1] == 4


def test_class_tokens_can_be_dropped():
    student, teacher = outputs(1), outputs(2)
    wanted = float(total(build("token-gram"), student, teacher))
    teacher.taps = {"late": torch.cat([maps((B, 2, F)), teacher.taps["tokens"]], dim=1)}
    found = build("token-gram", teacher_tap="late", teacher_prefix=2)
    assert float(total(found, student, teacher)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"variant": "scd"}])
def test_order_of_the_places_changes_nothing(options):
    student, teacher = outputs(1), outputs(2)
    wanted = float(total(build("token-gram", **options), student, teacher))
    for o in (student, teacher):
        o.taps = {"tokens": o.taps["tokens"][:, [4, 1, 8, 0, 2, 7, 3, 6, 5]]}
    assert float(total(build("token-gram", **options), student, teacher)) == pytest.approx(wanted, rel=1e-12)


def test_spatial_correlation_detaches_one_side():
    """The gradient is that of X Y^T with Y held, half of the whole product's on a symmetric loss."""
    student, teacher = outputs(1, grad=True), outputs(2)
    total(build("token-gram", variant="scd"), student, teacher).backward()
    x = student.taps["tokens"].detach().clone().requires_grad_()
    held, y = x.detach(), teacher.taps["tokens"]

    def scaled(g):
        low, high = g.min(dim=-1, keepdim=True).values, g.max(dim=-1, keepdim=True).values
        return (g - low) / (high - low) / 0.2

    p = scaled(torch.einsum("bnw,bmw->bnm", y, y)).softmax(-1)
    q = scaled(torch.einsum("bnw,bmw->bnm", x, held)).log_softmax(-1)
    (-(p * q).sum(-1).mean()).backward()
    torch.testing.assert_close(student.taps["tokens"].grad, x.grad)


# ------------------------------------------------------------------------------------------------ prefixes

INNERS = sorted(
    name for name in list_objectives() if name not in ("hint", "token-gram", "matryoshka", "matryoshka-2d")
    and not objective_needs(name).features and not objective_needs(name).taps and not objective_needs(name).classes
    and not objective_needs(name).masked_text and not objective_needs(name).regions
)  # fmt: skip


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("widths", [WIDTHS, OTHER], ids=["equal", "unequal"])
def test_full_width_is_the_inner_objective(inner, widths):
    """Of everything registered that reads embeddings, projectors included; and every prefix can be trained."""
    student = outputs(1)
    widths = WIDTHS if objective_needs(inner).momentum else widths  # an average is as wide as its student
    teacher = outputs(2, dim=widths.embedding, features=widths.image_features)
    whole, wrapped = build(inner, widths), build("matryoshka", widths, inner={"name": inner}, dims=[D])
    assert wrapped.needs == whole.needs == objective_needs("matryoshka", {"inner": {"name": inner}})
    assert wrapped.minimum_rows == whole.minimum_rows
    for key, value in whole.state_dict().items():
        assert torch.equal(wrapped.state_dict()[f"inners.0.{key}"], value)
    given = teacher if whole.needs.targets else None
    found, wanted = wrapped(student=student, teacher=given), whole(student=student, teacher=given)
    assert {key.removesuffix(f"_{D}"): float(value) for key, value in found.items()} == {
        key: float(value) for key, value in wanted.items()
    }
    both = build("matryoshka", widths, inner={"name": inner}, dims=[2, D])(student=student, teacher=given)
    assert {key.rpartition("_")[2] for key in both} == {"2", str(D)}


def test_prefixes_are_summed_by_weight():
    student, teacher = outputs(1), outputs(2)
    parts = [float(total(build("crd"), prefix(student, m), teacher)) for m in (2, 4, D)]
    found = build("matryoshka", dims=(2, 4, D), weights=(1.0, 3.0, 0.5))(student=student, teacher=teacher)
    assert sum(map(float, found.values())) == pytest.approx(parts[0] + 3 * parts[1] + 0.5 * parts[2], rel=1e-12)
    assert list(found) == ["crd_2", "crd_4", f"crd_{D}"]


def test_numbers_outside_a_prefix_get_no_gradient_from_it():
    student = outputs(1, grad=True)
    total(build("matryoshka", dims=(2,)), student, outputs(2)).backward()
    assert student.image.grad[:, :2].abs().sum() > 0
    assert student.image.grad[:, 2:].abs().sum() == 0


def test_teacher_is_cut_only_where_coordinates_are_compared():
    student, teacher = outputs(1), outputs(2)
    spoiled = dataclasses.replace(teacher, image=teacher.image.clone(), text=teacher.text.clone())
    spoiled.image[:, 2:] += 1.0
    cut_too = ("feature", "vl2v")
    for inner in (*cut_too, "crd", "gram", "icl", "cross-kd", "gradient", "afd"):
        objective = build("matryoshka", inner={"name": inner}, dims=(2,))
        values = [float(total(objective, student, t)) for t in (teacher, spoiled)]
        assert (values[0] == values[1]) == (inner in cut_too), inner
    shapes = [p.shape for p in build("matryoshka", inner={"name": "icl"}, dims=(2, D)).parameters() if p.ndim == 2]
    assert shapes == [(D, 2), (D, 2)]  # of the prefix alone: equal widths need none


def test_matryoshka_without_a_teacher_needs_none():
    objective = build_objective("matryoshka", student=Widths(8), inner={"name": "clip"}, dims=(4, 8))
    assert not objective.needs.targets
    with pytest.raises(UsageError, match="learns from a teacher"):
        build_objective("matryoshka", student=Widths(8), dims=(4, 8))


# ------------------------------------------------------------------------------------------------ mistakes


def tokens(shape: tuple[int, ...], side: Outputs) -> Outputs:
    return dataclasses.replace(side, taps={"tokens": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build("rankclip", cross=0.0, within=0), UsageError, "both weights"),
        (lambda: build("rankclip", cross=-1.0), UsageError, "from 0"),
        (lambda: build("rankclip", reduction="sum"), UnknownNameError, "released"),
        (lambda: build("correlation-congruence", order=0), UsageError, "whole number from 1"),
        (lambda: build("correlation-congruence", gamma=-1), UsageError, "above 0"),
        (lambda: build("order", neighbours=0), UsageError, "whole number from 1"),
        (lambda: build("order", of=()), UsageError, "empty"),
        (lambda: build("order", of="text-image"), UnknownNameError, "text-to-image"),
        (lambda: build("token-gram", variant="scdd"), UnknownNameError, "scd"),
        (lambda: total(build("token-gram", student_tap="token"), outputs(1), outputs(2)), UnknownNameError, "tokens"),
        (
            lambda: total(build("token-gram"), outputs(1), dataclasses.replace(outputs(2), taps={})),
            UsageError,
            "teacher outputs without any tap",
        ),
        (
            lambda: total(build("token-gram"), outputs(1), tokens((B, 10, 4), outputs(2))),
            UsageError,
            "teacher's 10 are no square grid",
        ),
        (lambda: total(build("token-gram"), outputs(1), tokens((B, 10), outputs(2))), UsageError, "before the pooling"),
        (lambda: total(build("token-gram"), outputs(1), tokens((B, 1, 4), outputs(2))), UsageError, "one token"),
        (lambda: build("matryoshka", dims=(2, 9)), UsageError, "to 5, the student's width"),
        (lambda: build("matryoshka", dims=(4, 2)), UsageError, "increasing"),
        (lambda: build("matryoshka", dims=(1, 2)), UsageError, "only a sign"),
        (lambda: build("matryoshka", dims=(2, 5), weights=(1.0,)), UsageError, "1 weights for 2 dims"),
        (lambda: build("matryoshka", dims=(2,), weights=(0.0,)), UsageError, "above 0"),
        (lambda: build("matryoshka", inner={"name": "cdr"}), UnknownNameError, "crd"),
        (lambda: build("matryoshka", inner={"name": "crd", "option": {}}), UnknownNameError, "options"),
        (lambda: build("matryoshka", inner={"name": "crd", "options": {"tau": 1}}), UnknownNameError, "temperature"),
        (lambda: build("matryoshka", inner="crd"), UsageError, "mapping with a name"),
        (lambda: build("matryoshka", inner={"name": "hint"}), UsageError, "reads no embedding"),
        (lambda: build("matryoshka", inner={"name": "matryoshka"}), UsageError, "twice"),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_options_of_an_inner_objective_are_a_mapping() -> None:
    with pytest.raises(UsageError, match="options of objective option 'inner' are 5"):
        build("matryoshka", WIDTHS, inner={"name": "crd", "options": 5})
