"""Every objective against an independently written oracle (plain loops over numpy float64), and its manners."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from contrastive_oracles import CONTRASTIVE_CASES
from objective_toys import (
    HAS_TEXT,
    OTHER,
    WIDTHS,
    B,
    build,
    captioned,
    contrast,
    cosine,
    huber,
    kl,
    outputs,
    project,
    rows,
    softmax,
    total,
    unit,
)

from pocketvlm.distill.objectives import (
    Outputs,
    Widths,
    build_objective,
    list_objectives,
    objective_needs,
    objective_options,
    rkd,
)
from pocketvlm.distill.objectives.rkd import AngleLoss, lopsided, squared_distances
from pocketvlm.distill.objectives.table import markdown, objective_rows
from pocketvlm.edge.errors import UnknownNameError, UsageError


def clip_oracle(o, s, t):
    image, text, groups = captioned(s)
    c = float(s.logit_scale)
    return (contrast(image, text, groups, c, o.duplicates) + contrast(text, image, groups, c, o.duplicates)) / 2


def icl_oracle(o, s, t):
    image, text, groups = captioned(s)
    t_image, t_text, _ = captioned(t)
    c = math.exp(float(o.log_scale.detach()))
    first = contrast(project(o.image_projector, image), t_text, groups, c, o.duplicates)
    second = contrast(project(o.text_projector, text), t_image, groups, c, o.duplicates)
    return (first + second) / 2


def distribution_oracle(s, t, scale_s: float, scale_t: float, measure) -> float:
    s_image, s_text, _ = captioned(s)
    t_image, t_text, _ = captioned(t)
    count, value = len(s_image), 0.0
    for i in range(count):
        p = softmax([scale_t * cosine(t_image[i], t_text[j]) for j in range(count)])
        q = softmax([scale_s * cosine(s_image[i], s_text[j]) for j in range(count)])
        value += measure(p, q) / count / 2
        p = softmax([scale_t * cosine(t_image[j], t_text[i]) for j in range(count)])
        q = softmax([scale_s * cosine(s_image[j], s_text[i]) for j in range(count)])
        value += measure(p, q) / count / 2
    return value


def crd_oracle(o, s, t):
    own = o.temperature is None
    scales = (float(s.logit_scale), float(t.logit_scale)) if own else (1 / o.temperature, 1 / o.temperature)
    return distribution_oracle(s, t, *scales, kl)


def affinity_oracle(o, s, t):
    scales = (o.logit_scale,) * 2 if o.logit_scale else (float(s.logit_scale), float(t.logit_scale))
    return distribution_oracle(s, t, *scales, lambda p, q: -math.fsum(a * math.log(b) for a, b in zip(p, q)))


def feature_oracle(o, s, t):
    def mean_distance(vectors, targets):
        values = []
        for x, y in zip(vectors, targets):
            if o.normalize:
                x, y = unit(x), unit(y)
            if o.distance == "cosine":
                values.append(1 - cosine(x, y))
            elif o.distance == "l2":
                values.append(math.dist(x, y) ** 2)
            else:
                values.append(math.fsum(huber(a - b, o.beta) / o.beta * o.beta for a, b in zip(x, y)))
        return sum(values) / len(values)

    _, s_text, _ = captioned(s)
    _, t_text, _ = captioned(t)
    image = mean_distance(project(o.image_projector, rows(s.image)), rows(t.image)) if o.image_weight else 0.0
    text = mean_distance(project(o.text_projector, s_text), t_text) if o.text_weight else 0.0
    return o.image_weight * image + o.text_weight * text


def hint_oracle(o, s, t):
    def standard(v):
        if o.standardize == "row":
            mean = math.fsum(v) / len(v)
            variance = math.fsum((x - mean) ** 2 for x in v) / len(v)
            return [(x - mean) / math.sqrt(variance + 1e-5) for x in v]
        return unit(v) if o.standardize == "unit" else v

    value = 0.0
    for x, y in zip(project(o.projector, rows(s.image_features)), rows(t.image_features)):
        terms = [a - b for a, b in zip(standard(x), standard(y))]
        row = sum(d * d if o.distance == "l2" else huber(d) for d in terms)
        value += row / (1 if o.standardize == "unit" else len(terms)) / B
    return value


def rkd_oracle(o, s, t):
    def one(x, y):
        x, y = ([unit(v) for v in z] if o.normalize else z for z in (x, y))
        n, value = len(x), 0.0
        means = [sum(math.dist(z[i], z[j]) for i in range(n) for j in range(n)) / (n * (n - 1)) for z in (x, y)]
        for i in range(n):
            for j in range(n):
                gap = math.dist(x[i], x[j]) / means[0] - math.dist(y[i], y[j]) / means[1]
                value += o.distance * huber(gap) / n**2
        m = min(n, o.angle_rows)
        for i in range(m):
            for j in range(m):
                for k in range(m):
                    cosines = []
                    for z in (x, y):
                        a, b = ([q - p for p, q in zip(z[i], z[other])] for other in (j, k))
                        flat = math.hypot(*a) < 1e-10 or math.hypot(*b) < 1e-10
                        cosines.append(0.0 if flat else cosine(a, b))
                    value += o.angle * huber(cosines[0] - cosines[1]) / m**3
        return value

    value = one(rows(s.image), rows(t.image)) if "image" in o.of else 0.0
    return value + (one(captioned(s)[1], captioned(t)[1]) if "text" in o.of else 0.0)


def gram_oracle(o, s, t):
    def one(x, y):
        n, value = len(x), 0.0
        if o.variant == "softmax":
            for i in range(n):
                others = [j for j in range(n) if j != i]
                p, q = (softmax([cosine(z[i], z[j]) / o.temperature for j in others]) for z in (y, x))
                value += kl(p, q) / n
            return value
        for i in range(n):
            if o.variant == "cosine":
                a, b = ([cosine(z[i], z[j]) for j in range(n)] for z in (x, y))
            else:
                a, b = (unit([math.fsum(p * q for p, q in zip(z[i], z[j])) for j in range(n)]) for z in (x, y))
            value += sum((p - q) ** 2 for p, q in zip(a, b)) / n**2
        return value

    value = one(rows(s.image), rows(t.image)) if "image" in o.of else 0.0
    return value + (one(captioned(s)[1], captioned(t)[1]) if "text" in o.of else 0.0)


def bank_oracle(o, s, t):
    scale_s = 1 / o.temperature if o.temperature else float(s.logit_scale)
    scale_t = 1 / o.teacher_temperature if o.teacher_temperature else float(t.logit_scale)
    anchors, t_anchors = rows(t.bank if o.anchors == "teacher" else s.bank), rows(t.bank)
    value = 0.0
    for i, (x, y) in enumerate(zip(project(o.projector, rows(s.image)), rows(t.image))):
        p, q = softmax([scale_t * cosine(y, a) for a in t_anchors]), softmax([scale_s * cosine(x, a) for a in anchors])
        if o.target == "top-logits":
            ids = t.top_ids[i].tolist()
            p = softmax(rows(t.top_logits)[i])
            q = [*(q[n] for n in ids), math.fsum(q[n] for n in range(len(q)) if n not in ids)]
        value += kl(p, q) / B
    return value


CASES = [
    ("clip", clip_oracle, {}),
    ("clip", clip_oracle, {"duplicates": "positives"}),
    ("clip", clip_oracle, {"duplicates": "negatives"}),
    ("crd", crd_oracle, {}),
    ("crd", crd_oracle, {"temperature": 0.5}),
    ("affinity", affinity_oracle, {"logit_scale": 5.0}),
    ("affinity", affinity_oracle, {"logit_scale": None}),
    ("icl", icl_oracle, {}),
    ("icl", icl_oracle, {"duplicates": "positives", "logit_scale": 3.0}),
    ("feature", feature_oracle, {}),
    ("feature", feature_oracle, {"distance": "cosine", "image": 0.5, "text": 3.0}),
    ("feature", feature_oracle, {"distance": "smooth-l1"}),
    ("feature", feature_oracle, {"distance": "smooth-l1", "normalize": False, "text": 0.0}),
    ("feature", feature_oracle, {"normalize": False}),
    ("hint", hint_oracle, {}),
    ("hint", hint_oracle, {"standardize": "unit", "projector": "mlp"}),
    ("hint", hint_oracle, {"standardize": "none", "distance": "smooth-l1"}),
    ("rkd", rkd_oracle, {}),
    ("rkd", rkd_oracle, {"of": ("image", "text"), "normalize": False, "angle_rows": 4}),
    ("rkd", rkd_oracle, {"of": "text", "distance": 0.0}),
    ("gram", gram_oracle, {}),
    ("gram", gram_oracle, {"variant": "spkd", "of": ("image", "text")}),
    ("gram", gram_oracle, {"variant": "softmax", "temperature": 0.3}),
    ("bank", bank_oracle, {}),
    ("bank", bank_oracle, {"anchors": "teacher", "temperature": 0.2}),
    ("bank", bank_oracle, {"temperature": 0.2, "teacher_temperature": 0.4}),
    ("bank", bank_oracle, {"target": "top-logits"}),
    ("bank", bank_oracle, {"target": "top-logits", "anchors": "teacher", "temperature": 1 / 6}),
    *CONTRASTIVE_CASES,
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}" for name, _, options in CASES]
every_case = pytest.mark.parametrize(("name", "oracle", "options"), CASES, ids=IDS)
# equal when student and teacher change places, by definition: a distance is symmetric, only its gradient is not
SYMMETRIC = {"feature", "rkd", "gradient"}
# files with the cases, oracles and manners of the other objectives
ELSEWHERE = (
    "test_objectives_relation", "test_objectives_tokens", "test_objectives_exits", "test_objectives_classes",
    "test_masked_language", "test_regions",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ values


def taught(cases: list) -> list:
    """The cases with a second model in them; the others would compare two different students."""
    return [case for case in cases if objective_needs(case[0], case[2]).targets]


def test_every_objective_has_an_oracle():
    """Told by the lists of cases that the files run, so that a file that goes is missed."""
    cases = [*CASES, *(case for file in ELSEWHERE for case in importlib.import_module(file).CASES)]
    assert {name for name, _, _ in cases} == set(list_objectives())
    assert all(callable(oracle) for _, oracle, _ in cases)


@every_case
def test_value_equals_the_loop_oracle(name, oracle, options):
    objective, student, teacher = build(name, **options).double(), outputs(1), outputs(2)
    wanted = oracle(objective, student, teacher)
    assert float(total(objective, student, teacher).detach()) == pytest.approx(wanted, rel=1e-10)


@every_case
def test_value_with_another_teacher_width(name, oracle, options):
    """Projectors (or their absence, where only similarities are compared) make unequal widths work."""
    if "widths" not in options and not objective_needs(name).momentum:
        objective = build(name, OTHER, **options)
        student, teacher = outputs(1), outputs(2, dim=OTHER.embedding, features=OTHER.image_features)
        wanted = oracle(objective, student, teacher)
        assert float(total(objective, student, teacher).detach()) == pytest.approx(wanted, rel=1e-6)


@every_case
def test_float32_and_bfloat16_are_close(name, oracle, options):
    """float32: rounding only. bfloat16 inputs under autocast: the objective works in float32, so that it must equal
    the oracle of the rounded inputs to float32 accuracy."""
    objective = build(name, **options)
    student, teacher = (outputs(seed, dtype=torch.float32) for seed in (1, 2))
    wanted = oracle(objective, student, teacher)
    # 26 to 216 summed float32 terms of size one: a few 1e-6; angle terms divide by short differences
    assert float(total(objective, student, teacher)) == pytest.approx(wanted, rel=2e-5)
    student, teacher = (outputs(seed, dtype=torch.bfloat16) for seed in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = total(objective, student, teacher)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(oracle(objective, student, teacher), rel=2e-5)


@pytest.mark.parametrize(("name", "oracle", "options"), taught(CASES))
def test_teacher_and_student_are_not_interchangeable(name, oracle, options):
    objective, a, b = build(name, **options), outputs(1), outputs(2)
    forward, backward = float(total(objective, a, b)), float(total(objective, b, a))
    symmetric = name in SYMMETRIC or (name == "gram" and options.get("variant") != "softmax")
    assert (forward == pytest.approx(backward, rel=1e-9)) == symmetric


@every_case
def test_perfect_student_is_a_minimum(name, oracle, options):
    """A student equal to its teacher has zero gradient wherever the objective is a divergence or a distance."""
    truth_or_own_constant = ("clip", "icl", "hint", "siglip", "multi-positive", "cwcl", "soft-negatives", "rafa", "afd")
    truth_or_own_constant += ("momentum",)
    mixed = (
        name in ("hycd", "vl2v", "multi-teacher")
        and options.get("blend") != 0.0
        and (name, options) != ("multi-teacher", {})
    )
    if name in truth_or_own_constant or mixed or "teacher_temperature" in options:
        return
    objective, teacher = build(name, **options), outputs(2)
    student = outputs(2, grad=True)
    value = total(objective, student, teacher)
    value.backward()
    if name != "affinity":
        assert float(value) == pytest.approx(0.0, abs=1e-12)
    for part in (student.image, student.text, student.bank):
        if part.grad is not None:
            assert part.grad.abs().max() < 1e-8


# ------------------------------------------------------------------------------------------------ gradients


@every_case
def test_gradients_are_right_and_reach_only_the_student(name, oracle, options):
    objective = build(name, **options).double()
    student, teacher = outputs(1, grad=True), outputs(2, grad=True)
    leaves = [student.image, student.text, student.image_features, student.bank, student.logit_scale]
    # rows without a caption have no part in any text term; coinciding texts of rkd are a corner, so split them
    with torch.no_grad():
        student.text[3] += 0.3

    def value(*tensors):
        image, text, features, bank, scale = tensors
        given = dataclasses.replace(
            student, image=image, text=text, image_features=features, bank=bank, logit_scale=scale
        )
        return total(objective, given, teacher)

    if name not in ("soft-negatives", "momentum"):  # whose targets follow the student without a gradient: tested apart
        assert torch.autograd.gradcheck(value, tuple(leaves), eps=1e-6, atol=1e-6, fast_mode=True)
    value(*leaves).backward()
    for part in (teacher.image, teacher.text, teacher.image_features, teacher.bank, teacher.logit_scale):
        assert part.grad is None
    assert any(part.grad is not None for part in leaves[:3]), "nothing of the student is trained"
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters() if p.numel() > 1)


@every_case
def test_trained_parts_are_the_ones_that_the_formula_names(name, oracle, options):
    widths = WIDTHS if "widths" in options or objective_needs(name).momentum else OTHER
    objective, student = build(name, widths, **options), outputs(1, grad=True)
    teacher = outputs(2, dim=widths.embedding, features=widths.image_features)
    total(objective, student, teacher).backward()
    of = objective.of if name in ("rkd", "gram") else ("image", "text")
    fixed = name in ("icl", "afd", "feature", "hint", "rkd", "gram", "rafa", "vl2v") or not options.get(
        "normalize", True
    )
    own_scale = not fixed and not (options.get("temperature") and name != "hycd") and not _pinned(objective)
    wanted = {
        "image": name != "hint" and "image" in of,
        "text": name not in ("hint", "bank", "vl2v") and "text" in of and options.get("text", 1.0) != 0.0,
        "image_features": name == "hint",
        "bank": name == "bank" and options.get("anchors") != "teacher",
        "logit_scale": own_scale,
    }
    found = {}
    for part in wanted:
        gradient = getattr(student, part).grad
        found[part] = gradient is not None and bool(gradient.abs().sum() > 0)
    assert found == wanted


def _pinned(objective) -> bool:
    return objective.name == "affinity" and objective.logit_scale is not None


# ------------------------------------------------------------------------------------------------ rows


@every_case
def test_rows_without_caption_are_ignored(name, oracle, options):
    """What an uncaptioned row's text holds (even NaN) changes neither the value nor any gradient."""
    objective, teacher = build(name, **options), outputs(2)
    student = outputs(1, grad=True)
    value = total(objective, student, teacher)
    value.backward()
    spoiled = outputs(1, grad=True)
    with torch.no_grad():
        spoiled.text[2] = math.nan
        teacher.text[2] = math.inf
    again = total(objective, spoiled, teacher)
    again.backward()
    assert float(again) == float(value)
    assert torch.equal(spoiled.image.grad, student.image.grad) if student.image.grad is not None else True
    if spoiled.text.grad is not None:
        assert spoiled.text.grad[2].abs().max() == 0


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
    only_pairs = objective.needs.captions and name != "vl2v"
    if only_pairs and (how != "one" or objective.minimum_rows > 1):
        assert [float(value) for value in terms.values()] == [0.0]
        assert student.image.grad is not None
        assert student.image.grad.abs().max() == 0
        # data parallelism waits for every parameter: all must be in the graph
        assert all(parameter.grad is not None for parameter in objective.parameters())
    for key, value in terms.items():
        if "text" in key and (how != "one" or name not in ("feature", "vl2v")):
            assert float(value) == 0.0


def test_batch_of_one_is_refused_where_rows_are_compared():
    def short(o: Outputs, n: int) -> Outputs:
        cut = {f.name: getattr(o, f.name) for f in dataclasses.fields(o)}
        for key in ("image", "text", "has_text", "image_features", "text_features", "group"):
            cut[key] = cut[key][:n]
        return Outputs(**cut)

    least = dict.fromkeys((name for name, _, _ in CASES), 2) | {"rkd": 3}
    least |= dict.fromkeys(("feature", "hint", "bank", "siglip", "rafa", "vl2v"), 1)
    for name, enough in least.items():
        objective = build(name)
        assert float(total(objective, short(outputs(1), enough), short(outputs(2), enough))) != 0, name
        for n in range(1, enough):
            with pytest.raises(UsageError, match=f"batch of {n} .*identically zero.*at least {enough}"):
                total(objective, short(outputs(1), n), short(outputs(2), n))
    with pytest.raises(UsageError, match="at least 3"):
        total(build("gram", variant="softmax"), short(outputs(1), 2), short(outputs(2), 2))


def test_duplicate_captions_are_not_negatives_unless_asked():
    """Two pictures of one caption, perfectly placed: plain CLIP still pushes them apart, the default does not."""
    image = torch.eye(3, dtype=torch.float64)[[0, 0, 1]].requires_grad_()
    given = Outputs(
        image=image,
        text=torch.eye(3, dtype=torch.float64)[[0, 0, 1]],
        logit_scale=torch.tensor(100.0),
        group=torch.tensor([7, 7, 8]),
    )
    values = {
        d: float(build("clip", duplicates=d)(student=given)["clip"]) for d in ("ignore", "negatives", "positives")
    }
    assert values["ignore"] == pytest.approx(0.0, abs=1e-9)
    assert values["negatives"] == pytest.approx(2 / 3 * math.log(2), rel=1e-9)
    assert values["positives"] == pytest.approx(2 / 3 * math.log(2), rel=1e-9)  # the entropy of an even target
    plain = build("clip")(student=dataclasses.replace(given, group=None))["clip"]
    assert float(plain) == pytest.approx(values["negatives"], rel=1e-12)


def test_coinciding_rows_do_not_explode_rkd():
    """A collapsed student has distances of zero; gradients must stay finite there."""
    student = outputs(1, grad=True)
    with torch.no_grad():
        student.image[:] = student.image[0].clone()
    total(build("rkd", of=("image", "text")), student, outputs(2)).backward()
    assert torch.isfinite(student.image.grad).all()
    assert torch.isfinite(student.text.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("close", [12, 6, 0])
@pytest.mark.parametrize("at_once", [1, 5])
def test_angles_of_close_rows_are_those_of_their_differences(dtype, close, at_once, monkeypatch):
    """Value and gradient against all differences at once, where products cancel: clusters 1e-4 wide, and equal rows.

    Of 12 rows the first `close` lie in clusters of three, so that float32 has to tell the vertices that it may do.
    """

    monkeypatch.setattr(rkd, "vertices_at_once", lambda _: at_once)

    def psi(z: torch.Tensor) -> torch.Tensor:
        difference = z[None] - z[:, None]
        length = difference.square().sum(-1, keepdim=True)
        direction = torch.where(length > 0, difference / torch.where(length > 0, length, 1.0).sqrt(), 0.0)
        return direction @ direction.transpose(1, 2)

    g = torch.Generator().manual_seed(0)
    rows, teacher = torch.randn(12, 6, generator=g), torch.randn(12, 8, generator=g).to(dtype)
    for first in range(0, close, 3):
        rows[first : first + 3] = rows[first] + 1e-4 * torch.randn(3, 6, generator=g)
    rows[5] = rows[4]
    student = rows.to(dtype).requires_grad_()
    squares, their_squares = squared_distances(student), squared_distances(teacher)
    found = lopsided(squares.detach()) | lopsided(their_squares)
    assert found.tolist() == [row < close for row in range(12)]
    value = AngleLoss.apply(squares, their_squares, dtype == torch.float64)
    value.backward()
    wide = student.detach().double().requires_grad_()
    wanted = torch.nn.functional.smooth_l1_loss(psi(wide), psi(teacher.double()))
    wanted.backward()
    # a cosine is off by 1e-16 / (1e-4)^2, a gradient by 1e4 times as much; float32 differences would be off by 1e-3
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=0, atol=1e-5 * float(wide.grad.abs().max()))


def test_affinity_and_crd_have_one_gradient():
    """Cross-entropy is KL plus the teacher's entropy: said in the docstring, so true."""
    gradients = []
    for name, options in (("crd", {"temperature": 0.1}), ("affinity", {"logit_scale": 10.0})):
        student = outputs(1, grad=True)
        total(build(name, **options), student, outputs(2)).backward()
        gradients.append(student.image.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_icl_scale_is_its_own_exponentiated_and_bounded():
    objective = build("icl", logit_scale=20.0)
    assert math.exp(float(objective.log_scale)) == pytest.approx(20.0, rel=1e-6)
    student = outputs(1, grad=True)
    total(objective, student, outputs(2)).backward()
    assert objective.log_scale.grad.abs() > 0
    assert student.logit_scale.grad is None
    with torch.no_grad():
        objective.log_scale.fill_(9.0)
    total(objective, outputs(1), outputs(2))
    assert math.exp(float(objective.log_scale)) == pytest.approx(100.0, rel=1e-5)


def test_spkd_is_not_the_cosine_gram():
    """Row-normalised Gram of raw features: scaling one *other* row changes it, scaling all rows does not."""
    objective, student, teacher = build("gram", variant="spkd"), outputs(1), outputs(2)
    value = float(total(objective, student, teacher))
    scaled = dataclasses.replace(student, image=student.image * 3.0)
    assert float(total(objective, scaled, teacher)) == pytest.approx(value, rel=1e-12)
    stretched = student.image.clone()
    stretched[0] *= 3.0
    changed = dataclasses.replace(student, image=stretched)
    assert float(total(objective, changed, teacher)) != pytest.approx(value, rel=1e-3)
    cosine_form = build("gram")
    assert float(total(cosine_form, changed, teacher)) == pytest.approx(float(total(cosine_form, student, teacher)))


# ------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("name", ["feature", "icl", "hint", "bank", "gradient", "afd", "cross-kd", "vl2v"])
def test_projector_is_seeded_saved_and_restored(name):
    options = {"anchors": "teacher"} if name == "bank" else {}
    torch.manual_seed(1)
    first = build(name, OTHER, **options)
    state_before = torch.get_rng_state()
    torch.manual_seed(2)
    second = build(name, OTHER, **options)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state_before), (
        "building an objective must not draw from the global generator"
    )
    other_seed = build_objective(name, student=WIDTHS, teacher=OTHER, seed=6, **options)
    assert any("projector" in key for key in first.state_dict())
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert any(not torch.equal(v, other_seed.state_dict()[k]) for k, v in first.state_dict().items())
    other_seed.load_state_dict(copy.deepcopy(first.state_dict()))
    teacher = outputs(2, dim=OTHER.embedding, features=OTHER.image_features)
    assert float(total(other_seed, outputs(1), teacher)) == float(total(first, outputs(1), teacher))


@pytest.mark.parametrize("name", ["feature", "icl", "gradient", "afd", "cross-kd"])
def test_image_and_text_projectors_differ(name):
    objective = build(name, OTHER)
    assert not torch.equal(objective.image_projector.weights[0], objective.text_projector.weights[0])


def test_equal_widths_need_no_projector():
    for name, options in (
        ("feature", {}),
        ("bank", {"anchors": "teacher"}),
        ("gradient", {}),
        ("cross-kd", {}),
        ("vl2v", {}),
    ):
        assert not list(build(name, **options).parameters())


# ------------------------------------------------------------------------------------------------ registry


def test_needs_are_known_before_building():
    assert objective_needs("clip").captions
    assert not objective_needs("clip").teacher
    assert objective_needs("bank").bank
    assert not objective_needs("bank").captions
    assert objective_needs("hint").features
    assert objective_options("crd") == {"temperature": None}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build("crdd"), UnknownNameError, "crd"),
        (lambda: build("crd", temprature=0.1), UnknownNameError, "temperature"),
        (lambda: build("crd", temperature=0.0), UsageError, "above 0"),
        (lambda: build("crd", temperature=math.inf), UsageError, "above 0"),
        (lambda: build("crd", temperature=math.nan), UsageError, "above 0"),
        (lambda: build("feature", distance="cosin"), UnknownNameError, "cosine"),
        (lambda: build("gram", of=("images",)), UnknownNameError, "image"),
        (lambda: build("gram", of=()), UsageError, "empty"),
        (lambda: build("rkd", distance=0.0, angle=0.0), UsageError, "both weights"),
        (lambda: build_objective("crd", student=WIDTHS), UsageError, "learns from a teacher"),
        (lambda: build_objective("hint", student=WIDTHS, teacher=Widths(embedding=3)), UsageError, "image features"),
        (lambda: build("crd")(student=outputs(1)), UsageError, "no teacher outputs"),
        (lambda: build("momentum")(student=outputs(1)), UsageError, "no outputs of the momentum model"),
        (
            lambda: build("momentum")(student=outputs(1), teacher=outputs(2, dim=OTHER.embedding)),
            UsageError,
            "7-wide outputs for a student of width 5",
        ),
        (lambda: build("momentum", alpha=1.5), UsageError, "'alpha' is 1.5"),
        (
            lambda: build("crd")(student=outputs(1), teacher=dataclasses.replace(outputs(2), text=None)),
            UsageError,
            "no teacher texts",
        ),
        (
            lambda: build("bank")(student=outputs(1), teacher=dataclasses.replace(outputs(2), bank=None)),
            UsageError,
            "without a bank",
        ),
        (
            lambda: build("bank")(
                student=dataclasses.replace(outputs(1), bank=outputs(1).bank[:3]), teacher=outputs(2)
            ),
            UsageError,
            "banks of 3 and 7",
        ),
        (
            lambda: build("hint")(student=dataclasses.replace(outputs(1), image_features=None), teacher=outputs(2)),
            UsageError,
            "image_features",
        ),
        (
            lambda: build("hint")(
                student=dataclasses.replace(outputs(1), image_features=torch.zeros(B, 9)), teacher=outputs(2)
            ),
            UsageError,
            "9-wide",
        ),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_numpy_is_not_needed_for_inputs():
    """Labels may come as numpy-backed tensors (the loader's), on which masks must work too."""
    student = outputs(1)
    student.has_text = torch.from_numpy(np.array(HAS_TEXT))
    assert math.isfinite(float(total(build("crd"), student, outputs(2))))


def test_the_table_in_the_docs_is_made_from_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert markdown() in page, "put the output of python -m pocketvlm.distill.objectives.table there"
    rows = {row["name"]: row for row in objective_rows()}
    assert all(row["formula"] and row["paper"] for row in rows.values())
    assert rows["crd"]["needs"] == "captions"
    assert rows["clip"]["needs"] == "captions, no teacher"
    assert rows["token-gram"]["needs"] == "token maps of the teacher, token maps of the student"
