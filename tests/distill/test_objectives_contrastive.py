"""What image-text objectives say of themselves in their docstrings, beside the oracles of contrastive_oracles.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from objective_toys import GROUP, HAS_TEXT, OTHER, WIDTHS, B, D, build, outputs, total

from pocketvlm.distill.objectives import Outputs, build_objective
from pocketvlm.distill.objectives.contrastive import DUPLICATES, info_nce
from pocketvlm.distill.objectives.cwcl import continuous_weights
from pocketvlm.distill.objectives.gradient import info_nce_gradients
from pocketvlm.distill.objectives.rafa import reference_points
from pocketvlm.distill.objectives.soft_negatives import softened
from pocketvlm.edge.errors import UnknownNameError, UsageError

KEEP = torch.tensor(HAS_TEXT)


def placed(rows: list[int], group: list[int] | None, scale: float = 100.0) -> Outputs:
    """Each pair exactly on the axis that `rows` names, all others at right angles."""
    axes = torch.eye(max(rows) + 1, dtype=torch.float64)[rows]
    given = None if group is None else torch.tensor(group)
    return Outputs(image=axes.clone().requires_grad_(), text=axes.clone(), logit_scale=torch.tensor(scale), group=given)


def gradients(objective, student: Outputs, teacher: Outputs) -> list[torch.Tensor]:
    total(objective, student, teacher).backward()
    return [student.image.grad, student.text.grad]


# ------------------------------------------------------------------------------------------------ siglip


def test_siglip_sums_over_pairs_and_divides_by_rows():
    """At logits of 0 every pair costs log 2: P log 2 in all, not log 2."""
    student = dataclasses.replace(placed([0, 1, 2, 3], None), logit_scale=torch.tensor(0.0))
    assert float(build("siglip", bias=0.0)(student=student)["siglip"]) == pytest.approx(4 * math.log(2), rel=1e-12)


def test_siglip_bias_is_its_own_or_the_students():
    own, student = build("siglip"), outputs(1, grad=True)
    assert float(own.bias) == -10.0
    total(own, student, student).backward()
    assert own.bias.grad.abs() > 0
    assert student.logit_bias.grad is None
    student = outputs(1, grad=True)
    shared = build("siglip", bias=None)
    assert not list(shared.parameters())
    total(shared, student, student).backward()
    assert student.logit_bias.grad.abs() > 0


def test_siglip_does_not_push_equal_captions_apart():
    values = {d: float(build("siglip", duplicates=d, bias=-50.0)(student=placed([0, 0, 1], [7, 7, 8]))["siglip"])
              for d in DUPLICATES}  # fmt: skip
    assert values["ignore"] == pytest.approx(0.0, abs=1e-12)
    assert values["positives"] == pytest.approx(0.0, abs=1e-12)
    assert values["negatives"] == pytest.approx(2 * 50 / 3, rel=1e-9)  # two pairs, each wrong by a logit of 50


# ------------------------------------------------------------------------------------------------ multi-positive


def test_multi_positive_is_not_clip_with_positives():
    """Any split of the mass within a group costs the reverse KL at most log 2; mass outside costs log(1/epsilon)."""
    even = placed([0, 0, 1], [7, 7, 8])
    assert float(build("multi-positive")(student=even)["multi-positive"]) == pytest.approx(0.0, abs=1e-7)
    one_sided = placed([0, 1, 2], [7, 7, 8])  # all mass on the own caption, none on the twin's
    reverse = float(build("multi-positive")(student=one_sided)["multi-positive"])
    forward = float(build("clip", duplicates="positives")(student=one_sided)["clip"])
    assert reverse == pytest.approx(2 * 2 / 3 * math.log(2), rel=1e-6)
    assert forward == pytest.approx(2 / 3 * 100 / 2, rel=1e-6)
    wrong = dataclasses.replace(one_sided, text=one_sided.text[[2, 1, 0]])
    assert float(build("multi-positive")(student=wrong)["multi-positive"]) > math.log(1e8)


# ------------------------------------------------------------------------------------------------ cwcl


def test_cwcl_weights_are_rows_of_chances_and_twins_weigh_most():
    weight = continuous_weights(torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]))
    torch.testing.assert_close(weight, torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))


def test_cwcl_sides_mirror_each_other():
    def swapped(o: Outputs) -> Outputs:
        return dataclasses.replace(o, image=o.text, text=o.image)

    student, teacher = outputs(1), outputs(2)
    image, text = build("cwcl"), build("cwcl", side="text")
    mirrored = total(text, swapped(student), swapped(teacher))
    assert float(mirrored) == pytest.approx(float(total(image, student, teacher)), rel=1e-12)
    assert float(total(text, student, teacher)) != pytest.approx(float(total(image, student, teacher)), rel=1e-3)


# ------------------------------------------------------------------------------------------------ soft-negatives


def test_soft_negatives_start_as_clip_and_soften_with_progress():
    student = outputs(1)
    for duplicates in DUPLICATES:
        objective = build_objective("soft-negatives", student=WIDTHS, duplicates=duplicates, softness=0.4)
        clip = float(build("clip", duplicates=duplicates)(student=student)["clip"])
        assert float(total(objective, student, student)) == pytest.approx(clip, rel=1e-12)
        values = []
        for progress in (0.0, 0.5, 1.0):
            objective.at(3, progress)
            values.append(float(total(objective, student, student)))
        assert values[0] == pytest.approx(clip, rel=1e-12)
        # the loss is linear in the softness that progress has reached
        assert values[1] == pytest.approx((values[0] + values[2]) / 2, rel=1e-12)
        assert values[2] != pytest.approx(values[0], rel=1e-3)


def test_soft_negatives_treat_their_target_as_a_constant():
    """The gradient of a cross-entropy with a fixed target is chance - target."""
    logits = (torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3).requires_grad_()
    softened(logits, None, "negatives", 0.3, slice(None)).backward()
    chance = logits.detach().softmax(dim=-1)
    for i in range(4):
        others = [j for j in range(4) if j != i]
        among = logits.detach()[i, others].softmax(dim=-1)
        target = torch.zeros(4, dtype=torch.float64)
        target[i], target[others] = 0.7, 0.3 * among
        torch.testing.assert_close(logits.grad[i], chance[i] - target)


@pytest.mark.parametrize("duplicates", ["ignore", "positives"])
def test_soft_negatives_of_one_group_alone_have_no_negatives(duplicates):
    student = dataclasses.replace(outputs(1, grad=True), group=torch.full((B,), 3))
    value = total(build("soft-negatives", duplicates=duplicates), student, student)
    clip = build("clip", duplicates=duplicates)(student=student)["clip"]
    assert float(value) == pytest.approx(float(clip), rel=1e-12, abs=1e-12)
    value.backward()
    assert torch.isfinite(student.image.grad).all()


# ------------------------------------------------------------------------------------------------ momentum


def test_momentum_ramps_its_soft_part_and_then_keeps_it():
    student, average = outputs(1), outputs(2)
    objective = build("momentum", alpha=0.6, ramp=0.2)

    def at(progress: float) -> float:
        objective.at(0, progress)
        return float(total(objective, student, average))

    hard = float(total(build("momentum", alpha=0.0), student, average))
    soft = float(total(build("momentum", alpha=1.0, ramp=0.0), student, average))
    assert at(0.0) == pytest.approx(hard, rel=1e-12)
    assert at(0.1) == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-12)
    assert at(0.2) == at(0.9) == pytest.approx(0.4 * hard + 0.6 * soft, rel=1e-12)
    assert hard != pytest.approx(soft, rel=1e-2)


def test_momentum_targets_and_keys_are_constants():
    """d/dc of a cross-entropy with a fixed target, by hand; and every embedding that moves is a query."""
    student, average = outputs(1, grad=True), outputs(2, grad=True)
    objective = build("momentum", alpha=0.5, ramp=0.0, duplicates="negatives")
    total(objective, student, average).backward()
    assert all(part.grad is None for part in (average.image, average.text, average.logit_scale))
    expected = 0.0
    v, s, theirs_v, theirs_s = (
        F.normalize(part.detach()[KEEP], dim=-1) for part in (student.image, student.text, average.image, average.text)
    )
    scale = student.logit_scale.detach()
    for queries, their_queries, keys in ((v, theirs_v, theirs_s), (s, theirs_s, theirs_v)):
        cosines = queries @ keys.T
        target = 0.5 * torch.eye(len(v)) + 0.5 * (scale * their_queries @ keys.T).softmax(dim=-1)
        chance = (scale * cosines).softmax(dim=-1)
        expected += float(((chance - target) * cosines).sum(dim=-1).mean()) / 2
    assert float(student.logit_scale.grad) == pytest.approx(expected, rel=1e-10)
    pictures = student.image.grad
    again = outputs(1, grad=True)
    with torch.no_grad():
        again.text.mul_(-1.0)  # the student's captions are no keys, so its pictures do not feel them
    total(objective, again, average).backward()
    torch.testing.assert_close(again.image.grad, pictures)


def test_a_student_that_is_its_average_has_soft_targets_without_gradient_on_itself():
    """alpha 1 and equal models: the target is the student's own softmax, a minimum."""
    student = outputs(2, grad=True)
    total(build("momentum", alpha=1.0, ramp=0.0), student, outputs(2)).backward()
    assert max(float(part.grad.abs().max()) for part in (student.image, student.text, student.logit_scale)) < 1e-9


# ------------------------------------------------------------------------------------------------ hycd, cross-kd


def test_hycd_lies_between_clip_and_crd():
    student, teacher = outputs(1), outputs(2)
    for duplicates in ("ignore", "negatives"):
        clip = float(build("clip", duplicates=duplicates)(student=student)["clip"])
        truth = build("hycd", blend=1.0, duplicates=duplicates)
        assert float(total(truth, student, teacher)) == pytest.approx(clip, rel=1e-12)
    knowledge = build("hycd", blend=0.0, duplicates="negatives")
    crd = float(total(build("crd"), student, teacher))
    assert float(total(knowledge, student, teacher)) == pytest.approx(crd, rel=1e-12)


def test_hycd_raw_reads_lengths_and_no_logit_scale():
    student, teacher = outputs(1), outputs(2)
    raw = build("hycd", normalize=False)
    value = float(total(raw, student, teacher))
    other_scale = dataclasses.replace(student, logit_scale=torch.tensor(99.0))
    assert float(total(raw, other_scale, teacher)) == value
    longer = dataclasses.replace(student, image=2 * student.image)
    assert float(total(raw, longer, teacher)) != pytest.approx(value, rel=1e-3)
    normal = build("hycd")
    assert float(total(normal, longer, teacher)) == pytest.approx(float(total(normal, student, teacher)), rel=1e-12)


def test_cross_kd_never_compares_the_student_with_itself():
    """What the pictures learn does not depend on the student's captions, unlike in crd."""
    for name, apart in (("cross-kd", True), ("crd", False)):
        first, second = outputs(1, grad=True), outputs(1, grad=True)
        with torch.no_grad():
            second.text *= torch.linspace(-1, 2, D)
        pairs = [gradients(build(name), student, outputs(2))[0] for student in (first, second)]
        assert torch.equal(*pairs) == apart


# ------------------------------------------------------------------------------------------------ rafa


def test_rafa_points_are_a_function_of_seed_and_step_alone():
    objective, student = build("rafa"), outputs(1)
    state = torch.get_rng_state()
    first = float(total(objective, student, student))
    assert torch.equal(torch.get_rng_state(), state), "a random point must not draw from the global generator"
    torch.manual_seed(99)
    objective.at(8, 0.5)
    assert float(total(objective, student, student)) != first
    objective.at(7, 0.9)
    assert float(total(objective, student, student)) == first, "only the step counts"
    assert not torch.equal(reference_points(5, 7, B, D), reference_points(6, 7, B, D))


def test_rafa_points_stay_with_their_row_when_captions_go():
    """The value of all pairs is the mean of what each pair alone would give."""
    objective, student = build("rafa"), outputs(1)
    alone = []
    for row in range(B):
        if HAS_TEXT[row]:
            only = dataclasses.replace(student, has_text=torch.arange(B) == row)
            alone.append(float(total(objective, only, only)))
    assert float(total(objective, student, student)) == pytest.approx(sum(alone) / len(alone), rel=1e-12)


def test_rafa_shares_one_standard_point_between_picture_and_caption():
    point = reference_points(0, 0, 2000, 8)
    # 16,000 draws: the mean is within 5/126 and the variance within 5 * sqrt(2)/126 of a standard normal's
    assert abs(float(point.mean())) < 0.04
    assert abs(float(point.var()) - 1) < 0.06
    objective = build_objective("rafa", student=WIDTHS, seed=0)
    at_the_point = reference_points(0, 0, B, D)
    student = Outputs(image=at_the_point, text=at_the_point)
    assert float(total(objective, student, student)) == 0.0


def test_rafa_released_reduction_is_two_over_d_of_the_papers():
    student = outputs(1)
    paper, code = (float(total(build("rafa", reduction=r), student, student)) for r in ("paper", "element"))
    assert code == pytest.approx(paper * 2 / D, rel=1e-12)


# ------------------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize("duplicates", DUPLICATES)
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_closed_form_gradients_equal_autograd(duplicates, scale):
    """Also at scale 100, where dividing by the scale, as the released code does, is 10,000 times too little."""
    student, group = outputs(1), torch.tensor(GROUP)[KEEP]
    v, s = (F.normalize(part[KEEP], dim=-1).requires_grad_() for part in (student.image, student.text))
    wanted = torch.autograd.grad(info_nce(scale * v @ s.T, group, duplicates), (v, s))
    found = info_nce_gradients(v.detach(), s.detach(), scale, group, duplicates)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-11, atol=1e-13)


# ------------------------------------------------------------------------------------------------ afd


def test_afd_scale_is_its_own_exponentiated_and_bounded():
    objective, student = build("afd", logit_scale=20.0), outputs(1, grad=True)
    assert math.exp(float(objective.log_scale)) == pytest.approx(20.0, rel=1e-6)
    total(objective, student, outputs(2)).backward()
    assert objective.log_scale.grad.abs() > 0
    with torch.no_grad():
        objective.log_scale.fill_(9.0)
    total(objective, outputs(1), outputs(2))
    assert math.exp(float(objective.log_scale)) == pytest.approx(100.0, rel=1e-5)


def test_afd_projector_takes_both_models_and_exists_between_equal_widths():
    assert build("afd").image_projector.weights[0].shape == (D, 2 * D)
    assert build("afd", OTHER).text_projector.weights[0].shape == (D, D + OTHER.embedding)


# ------------------------------------------------------------------------------------------------ vl2v


def test_vl2v_image_term_is_feature_cosine_without_the_one():
    student, teacher = outputs(1), outputs(2)
    feature = build("feature", distance="cosine", text=0.0)(student=student, teacher=teacher)["feature_image"]
    found = build("vl2v", image_share=0.3)(student=student, teacher=teacher)
    assert float(found["vl2v_image"]) == pytest.approx(0.3 * (float(feature) - 1), rel=1e-12)
    assert float(build("vl2v", image_share=1.0)(student=student, teacher=teacher)["vl2v_text"]) == 0.0


# ------------------------------------------------------------------------------------------------ multi-teacher


def test_one_of_several_teachers_is_crd():
    student, teacher = outputs(1), outputs(2)
    wanted = float(total(build("crd"), student, teacher))
    assert float(total(build("multi-teacher"), student, teacher)) == pytest.approx(wanted, rel=1e-12)


def test_several_teachers_average_after_the_softmax():
    """The gradient is that of KL to the mean of the teachers' distributions, not to their mean similarity."""
    options = {"widths": [2, 3], "logit_scales": [3.0, 7.0]}
    student, teacher = outputs(1, grad=True), outputs(2)
    found = gradients(build("multi-teacher", **options), student, teacher)[0]
    v, s = (F.normalize(part[KEEP], dim=-1) for part in (student.image, student.text.detach()))
    logits = student.logit_scale.detach() * v @ s.T
    similarities = []
    for part, scale in ((slice(0, 2), 3.0), (slice(2, 5), 7.0)):
        image, text = (F.normalize(x[KEEP][:, part], dim=-1) for x in (teacher.image, teacher.text))
        similarities.append(scale * image @ text.T)

    def gradient_towards(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        one = F.kl_div(logits.log_softmax(-1), rows, reduction="batchmean")
        other = F.kl_div(logits.T.log_softmax(-1), columns, reduction="batchmean")
        return torch.autograd.grad((one + other) / 2, student.image, retain_graph=True)[0]

    rows, columns = (sum(z.softmax(-1) for z in way) / 2 for way in (similarities, [z.T for z in similarities]))
    torch.testing.assert_close(found, gradient_towards(rows, columns), rtol=1e-10, atol=1e-13)
    mean = sum(similarities) / 2
    assert not torch.allclose(found, gradient_towards(mean.softmax(-1), mean.T.softmax(-1)), rtol=1e-2)


def test_the_teachers_of_a_run_say_where_to_cut():
    """Also for a student of another width, which is the paper's case; scales that a recipe names go first."""
    several = dataclasses.replace(OTHER, parts=((3, 3.0), (4, 7.0)))
    student, teacher = outputs(1), outputs(2, dim=7)
    wanted = float(total(build("multi-teacher", widths=[3, 4], logit_scales=[3.0, 7.0]), student, teacher))
    assert float(total(build("multi-teacher", teacher=several), student, teacher)) == pytest.approx(wanted, rel=1e-12)
    named = build("multi-teacher", teacher=several, logit_scales=[70.0, 60.0])
    assert (named.widths, named.logit_scales) == ([3, 4], [70.0, 60.0])
    with pytest.raises(UsageError, match="2 widths and 3 logit scales"):
        build("multi-teacher", teacher=several, logit_scales=[1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="1 widths and 2 logit scales"):
        total(build("multi-teacher", logit_scales=[1.0, 2.0]), student, teacher)


def test_scaling_a_teachers_part_changes_nothing():
    objective, student, teacher = build("multi-teacher", widths=[2, 3]), outputs(1), outputs(2)
    scaled = dataclasses.replace(teacher, image=teacher.image * torch.tensor([9.0, 9.0, 1.0, 1.0, 1.0]))
    assert float(total(objective, student, scaled)) == pytest.approx(
        float(total(objective, student, teacher)), rel=1e-12
    )


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build("hycd", blend=1.5), UsageError, "from 0 to 1"),
        (lambda: build("vl2v", image_share="half"), UsageError, "from 0 to 1"),
        (lambda: build("soft-negatives", softness=-0.1), UsageError, "from 0 to 1"),
        (lambda: build("multi-positive", epsilon=0.0), UsageError, "above 0"),
        (lambda: build("cwcl", side="picture"), UnknownNameError, "image"),
        (lambda: build("siglip", duplicates="ignored"), UnknownNameError, "ignore"),
        (lambda: build("rafa", reduction="mean"), UnknownNameError, "element"),
        (lambda: build("multi-teacher", widths=[2, 3], logit_scales=[7.0]), UsageError, "2 widths and 1 logit scales"),
        (lambda: build("multi-teacher", widths=[2, None]), UsageError, "above 0"),
        (lambda: build("multi-teacher", widths=[]), UsageError, "0 widths"),
        (lambda: total(build("multi-teacher", widths=[2, 2]), outputs(1), outputs(2)), UsageError, "2.2 wide .* 5 col"),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
