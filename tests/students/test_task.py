"""Class heads: the mixtures against plain arithmetic, the fold in float64, and a task student on disk and deployed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import (
    Classes,
    Student,
    build_student,
    deploy_image,
    load_student,
    save_student,
    train_tokenizer,
)
from pocketvlm.students.task import SHARES, ClassHeads, choose_mixing, mixed_logits

LABELS = ("cat", "dog", "eel")
TINY = {"image": {"size": 32}, "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 100}}


def heads(mix: str, share: float, temperature: float = 1.0, width: int = 5) -> ClassHeads:
    made = ClassHeads(width, Classes(LABELS, mix=mix)).double()  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
        made.share.fill_(share)
        made.temperature.fill_(temperature)
    return made


def student(mix: str = "probabilities") -> Student:
    tokenizer = train_tokenizer(["a cat", "a dog", "an eel"], vocab_size=100)
    classes = Classes(LABELS, ("{}", "a picture of {}"), mix)  # type: ignore[arg-type]
    made = build_student(
        "mnv4-035", embed_dim=8, tokenizer_json=tokenizer, overrides=TINY, classes=classes, space_id="teacher-0"
    )
    assert made.heads is not None
    with torch.no_grad():
        for parameter in made.heads.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return made.eval()


def by_hand(made: ClassHeads, row: list[float]) -> list[float]:
    def logits(head: torch.nn.Linear) -> list[float]:
        weight, bias = head.weight.tolist(), head.bias.tolist()
        return [math.fsum(w * x for w, x in zip(line, row)) + b for line, b in zip(weight, bias)]

    def softmax(values: list[float]) -> list[float]:
        found = [math.exp(value) for value in values]
        return [value / sum(found) for value in found]

    own, taught = logits(made.label_head), logits(made.taught_head)
    a, b = float(made.share), float(made.temperature)
    if made.classes.mix == "logits":
        return softmax([(1 - a) * p + a * q for p, q in zip(own, taught)])
    return [(1 - a) * p + a * q for p, q in zip(softmax(own), softmax([q / b for q in taught]))]


@pytest.mark.parametrize(("mix", "temperature"), [("logits", 1.0), ("probabilities", 1.0), ("probabilities", 0.5)])
@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_mixture_is_the_formula_and_what_ships_computes_it(mix: str, temperature: float, share: float) -> None:
    made = heads(mix, share, temperature)
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.tensor([by_hand(made, row) for row in features.tolist()], dtype=torch.float64)
    # float64; `share` is kept in float32 by the student, here it is exact to 1e-8 at 0.35
    torch.testing.assert_close(made.mixed(features).softmax(dim=1), wanted, rtol=1e-12, atol=1e-14)
    shipped = made.deployed()
    torch.testing.assert_close(shipped(features).softmax(dim=1), wanted, rtol=1e-12, atol=1e-14)
    folded = mix == "logits" or share in (0.0, 1.0)
    assert isinstance(shipped, torch.nn.Linear) == folded
    count = sum(parameter.numel() for parameter in shipped.parameters())
    assert count == (1 if folded else 2) * (5 + 1) * len(LABELS)


def test_folding_probabilities_would_be_wrong() -> None:
    """The test above can fail: one linear layer of the averaged weights is another classifier."""
    made = heads("probabilities", 0.35)
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wrong = made._folded(0.65, 0.35)(features).softmax(dim=1)
    assert (wrong - made.mixed(features).softmax(dim=1)).abs().max() > 0.01


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_sure_heads_give_finite_logits(mix: str) -> None:
    own, taught = torch.tensor([[500.0, 0.0, -500.0]]), torch.tensor([[0.0, 500.0, -500.0]])
    assert torch.isfinite(mixed_logits(own, taught, 0.5, 0.5, mix)).all()  # type: ignore[arg-type]
    made = ClassHeads(3, Classes(LABELS, mix=mix))  # type: ignore[arg-type]
    with torch.no_grad():
        made.label_head.weight.copy_(500 * torch.eye(3))
        made.taught_head.weight.copy_(500 * torch.eye(3)[[1, 2, 0]])
    assert torch.isfinite(made.deployed()(torch.tensor([[1.0, 0.0, 0.0]]))).all()


def test_mixing_is_chosen_by_right_answers_then_by_sureness() -> None:
    label = torch.tensor([0, 1, 2, 0])
    right, wrong = 4 * torch.eye(3)[label], 4 * torch.eye(3)[(label + 1) % 3]
    assert choose_mixing(right, wrong, label, "logits") == (0.0, 1.0)
    assert choose_mixing(wrong, right, label, "logits") == (1.0, 1.0)
    # all shares answer alike: the surest is the taught head at its lowest temperature
    assert choose_mixing(right / 4, right, label, "probabilities") == (1.0, 0.5)
    assert choose_mixing(wrong, right, label, "probabilities", (0.25,))[0] == 0.25
    assert SHARES[0] == 0
    assert SHARES[-1] == 1
    assert len(SHARES) == 21


def test_heads_start_at_zero_and_draw_nothing() -> None:
    made = ClassHeads(4, Classes(LABELS))
    own, taught = made(torch.ones(2, 4))
    assert own.abs().max() == taught.abs().max() == 0
    one, other = (
        student(),
        build_student("mnv4-035", embed_dim=8, tokenizer_json=student().tokenizer_json, overrides=TINY),
    )
    # heads change nothing of the start of the towers
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_a_task_student_is_a_classifier_on_disk_and_deployed(mix: str, tmp_path: Path) -> None:
    made = student(mix)
    assert made.heads is not None
    made.heads.share.fill_(0.25)
    contract = made.contract
    assert (contract.kind, contract.labels, contract.embed_dim, contract.text) == ("classifier", LABELS, 3, None)
    save_student(made, tmp_path / "saved")
    again = load_student(tmp_path / "saved")
    assert again.heads is not None
    assert (again.contract, again.heads.classes) == (contract, made.heads.classes)
    assert (again.embed_dim, again.space_id, float(again.heads.share)) == (8, "teacher-0", 0.25)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    again = again.double()
    wanted = again.heads.mixed(again.encode_image(pixels).features)  # type: ignore[union-attr]
    torch.testing.assert_close(deploy_image(again)(pixels), wanted, rtol=1e-10, atol=1e-10)
    made.heads.share.fill_(0.75)
    assert made.contract.model_id != contract.model_id, "another mixture is another model"


@pytest.mark.parametrize("labels", [("cat",), ("cat", "cat", "dog"), ()])
def test_one_class_is_no_task(labels: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="at least two different"):
        ClassHeads(4, Classes(labels))


def test_a_classifier_contract_names_every_logit() -> None:
    value = student().contract.to_dict()
    assert ModelContract.from_dict(json.loads(json.dumps(value))).labels == LABELS
    with pytest.raises(UsageError, match="2 labels for 3 logits"):
        ModelContract.from_dict(value | {"labels": ["cat", "dog"]})
