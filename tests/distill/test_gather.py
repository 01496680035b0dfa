"""Two ranks equal one rank, in values and in gradients, for every objective.

The ranks are two processes that run this very file as a script; gloo meets through a file, so no port is needed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_toys import two_processes
from torch import nn

from pocketvlm.distill.balance import GradientBalance
from pocketvlm.distill.gather import gather_outputs
from pocketvlm.distill.objectives import Outputs, Widths, build_objective, list_objectives
from pocketvlm.distill.objectives.blocks import shared_rows, similarity_bytes
from pocketvlm.distill.ranks import ALONE, Ranks
from pocketvlm.edge.errors import UsageError

ROWS, SPLIT, N = 9, 5, 6  # uneven on purpose: 5 rows on rank 0, 4 on rank 1
TAPS = {"tokens": 2, "text.tokens": 2, "b": 1, "text.exit.1": 4}
STUDENT = Widths(4, 7, 7, TAPS, token_table=3, text_blocks=1)
TEACHER = Widths(5, 6, 6, {"tokens": 2})


class Towers(nn.Module):
    """A student small enough to compare every gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in (("image", (4, 7)), ("text", (4, 7)), ("body", (7, 3))):
            setattr(self, name, nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64)))
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, words: torch.Tensor, **labels: torch.Tensor) -> Outputs:
        features, text_features = torch.tanh(pixels @ self.body.T), torch.tanh(ids @ self.body.T)
        return Outputs(
            image=features @ self.image.T,
            text=text_features @ self.text.T,
            logit_scale=self.log_scale.exp(),
            logit_bias=self.bias,
            image_features=features,
            text_features=text_features,
            taps={
                "b": features.reshape(-1, 7, 1),
                "a": text_features,
                "tokens": torch.stack([features[:, :4], features[:, 3:]], dim=2),
                "text.exit.1": torch.cos(text_features) @ self.text.T,
                "text.tokens": torch.stack([text_features[:, :5], text_features[:, 2:]], dim=2),
            },
            masked_image=torch.sin(pixels @ self.body.T) @ self.image.T,
            masked_words=torch.stack([text_features, features], dim=1),
            token_table=self.body,
            regions=torch.stack([features, text_features], dim=1) @ self.image.T,
            region_targets=torch.stack([text_features, features.cos()], dim=1) @ self.text.T,
            bank=torch.tanh(words @ self.body.T) @ self.text.T,
            class_logits=features[:, :3] * 2,
            taught_logits=features[:, 3:6] * 3,
            **labels,
        )


def batch(start: int, stop: int) -> tuple[dict[str, torch.Tensor], Outputs]:
    """This rank's share of one fixed global batch, and the teacher's outputs for it."""
    g = torch.Generator().manual_seed(1)
    draw = {k: torch.randn(n, w, generator=g, dtype=torch.float64) for k, n, w in (
        ("pixels", ROWS, 3), ("ids", ROWS, 3), ("words", N, 3), ("image", ROWS, 5), ("text", ROWS, 5),
        ("features", ROWS, 6), ("bank", N, 5), ("tokens", ROWS, 8), ("classes", ROWS, 3),
    )}  # fmt: skip
    has_text = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)[start:stop]
    group = torch.tensor([0, 1, -3, 0, -5, 2, 1, -8, 3])[start:stop]
    text_mask = torch.tensor([[place < length for place in range(5)] for length in (2, 5, 0, 1, 0, 4, 3, 0, 5)])
    teacher = Outputs(
        image=draw["image"][start:stop],
        text=draw["text"][start:stop],
        has_text=has_text,
        logit_scale=torch.tensor(8.0, dtype=torch.float64),
        image_features=draw["features"][start:stop],
        bank=draw["bank"],
        class_logits=draw["classes"][start:stop],
        top_logits=draw["classes"][start:stop].log_softmax(dim=1),
        top_ids=draw["features"][start:stop, :N].argsort(dim=1)[:, :2],
        taps={"tokens": draw["tokens"][start:stop].reshape(-1, 4, 2)},
    )
    inputs = {"pixels": draw["pixels"][start:stop], "ids": draw["ids"][start:stop], "words": draw["words"]}
    pieces = torch.tensor([[6, 2], [1, -1], [-1, -1], [0, 3], [-1, -1], [5, 5], [4, -1], [-1, -1], [2, 6]])[start:stop]
    labels = {"has_text": has_text, "group": group, "text_mask": text_mask[start:stop], "masked_pieces": pieces}
    cells = torch.tensor([2, 1, 2, 2, 0, 1, 2, 2, 1])[start:stop]
    labels["region_mask"] = torch.arange(2) < cells[:, None]
    labels["label"] = torch.tensor([1, -1, 0, -1, 2, 2, -1, -1, 0])[start:stop]
    return {**inputs, **labels}, teacher


def objectives() -> list[tuple[str, dict[str, object]]]:
    extra = [("bank", {"anchors": "teacher"}), ("bank", {"target": "top-logits"})]
    extra += [("gram", {"variant": "spkd", "of": ("image", "text")})]
    extra += [("order", {"of": ("image", "text", "image-to-text", "text-to-image"), "neighbours": 2})]
    extra += [("matryoshka", {"inner": {"name": "icl"}, "dims": (2, 4)}), ("token-gram", {"variant": "scd"})]
    extra += [("matryoshka", {"inner": {"name": "momentum"}})]
    extra += [("matryoshka-2d", {"inner": {"name": "icl"}, "pairs": [[1, 2], [1, 4]], "detach": False})]
    extra += [("hint", {"student_tap": "tokens", "teacher_tap": "tokens"}), ("hint", {"student_tap": "b"})]
    extra += [("token-alignment", {"variant": "words"}), ("matryoshka", {"inner": {"name": "masked-feature"}})]
    extra += [("siglip", {"bias": None}), ("multi-teacher", {"widths": [2, 3], "logit_scales": [5.0, 9.0]})]
    return [*((name, {}) for name in list_objectives()), *extra]


def run_all(start: int, stop: int, ranks: int, rank: int = 0, least: int = 0) -> list[dict[str, torch.Tensor]]:
    """Value and averaged gradients of every objective, as a data-parallel loop would have them.

    least: entries of the matrices that the ranks share out, as `shared_rows`.
    """
    with shared_rows(rank, ranks, least):
        return [one(name, options, start, stop, ranks) for name, options in objectives()]


def one(name: str, options: dict[str, object], start: int, stop: int, ranks: int) -> dict[str, torch.Tensor]:
    student = Towers()
    objective = build_objective(name, student=STUDENT, teacher=TEACHER, seed=3, **options).double()
    objective.at(4, 0.5)
    inputs, teacher = batch(start, stop)
    if objective.needs.momentum:  # an average of the student is as wide as the student
        with torch.no_grad():
            teacher = Towers(seed=9)(**inputs)
    given = {"teacher": gather_outputs(teacher)} if objective.needs.targets else {}
    terms = objective(student=gather_outputs(student(**inputs)), **given)
    sum(terms.values()).backward()
    found = {f"value {key}": value.detach() for key, value in terms.items()}
    for key, parameter in [*student.named_parameters(), *objective.named_parameters(prefix="objective")]:
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if ranks > 1:
            dist.all_reduce(gradient)
        found[f"gradient {key}"] = gradient / ranks
    return found


def of_clip(start: int, stop: int, rank: int, least: int) -> float:
    """The gradient of `clip` with respect to the scale, before it is averaged over ranks."""
    inputs, _ = batch(start, stop)
    student = Towers()
    with shared_rows(rank, 2, least):
        build_objective("clip", student=STUDENT)(student=gather_outputs(student(**inputs)))["clip"].backward()
    return float(student.log_scale.grad)


def balanced(start: int, stop: int, ranks: Ranks = ALONE) -> list[float]:
    """Norms that `train.balance` would measure: of objectives over pairs, a bank, and a term that is exactly 0."""
    names = ("clip", "crd", "bank", "hint")
    balance = GradientBalance(len(names))
    inputs, teacher = batch(start, stop)
    student = gather_outputs(Towers()(**inputs))
    theirs = gather_outputs(teacher)
    for place, name in enumerate(names):
        objective = build_objective(name, student=STUDENT, teacher=TEACHER, seed=3).double()
        with shared_rows(*ranks.place, 0):
            loss = sum(objective(student=student, teacher=theirs).values())
        balance.measure(place, loss, student, ranks.mean)
    return balance.norms


def plain(outputs: Outputs) -> dict[str, object]:
    """Detached tensors by field name, taps by their own names."""
    fields = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    taps = {name: value.detach() for name, value in fields.pop("taps").items()}
    return {name: value.detach() for name, value in fields.items() if value is not None} | {"taps": taps}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    bounds = ((0, SPLIT), (SPLIT, ROWS))[rank]
    found = run_all(*bounds, 2, rank)
    with similarity_bytes(0, 4 * 8 * 2):
        blocks = run_all(*bounds, 2, rank)
    whole = run_all(*bounds, 2, rank, least=1 << 30)
    inputs, _ = batch(*bounds)
    gathered = gather_outputs(Towers()(**inputs))
    odd = Towers()(**inputs)
    try:
        gather_outputs(dataclasses.replace(odd, text=odd.text if rank else None))
        message = ""
    except UsageError as error:
        message = str(error)
    norms = balanced(*bounds, Ranks(rank, 2))
    own = of_clip(*bounds, rank, 0), of_clip(*bounds, rank, 1 << 30)
    results = {"own": own, "shared": found, "shared, in blocks": blocks, "whole": whole}
    torch.save({"norms": norms, **results, "outputs": plain(gathered), "message": message}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return two_processes(__file__, folder, timeout=120)


@pytest.mark.parametrize("how", ["shared", "shared, in blocks", "whole"])
def test_two_ranks_equal_one(two_ranks, how):
    """Whether they share the rows of a matrix out or each compute the whole; captions are unevenly spread."""
    whole = run_all(0, ROWS, ranks=1)
    assert len(whole) == len(objectives())
    for index, (name, _) in enumerate(objectives()):
        for rank in range(2):
            part = two_ranks[rank][how][index]
            assert part.keys() == whole[index].keys()
            for key, wanted in whole[index].items():
                # float64, other summation order: 1e-12 is a thousand roundings
                torch.testing.assert_close(part[key], wanted, rtol=1e-11, atol=1e-12, msg=f"{name}: {key}")
        assert any(value.abs().sum() > 0 for key, value in whole[index].items() if key.startswith("gradient"))


def test_each_rank_computes_its_part_where_losses_are_shared_out(two_ranks):
    (mine, whole), (yours, other) = (part["own"] for part in two_ranks)
    assert whole == other
    assert abs(mine - yours) > 1e-3
    assert (mine + yours) / 2 == pytest.approx(whole, rel=1e-12)


def test_two_ranks_balance_alike_and_like_one(two_ranks):
    wanted = balanced(0, ROWS)
    assert all(norm > 0 for norm in wanted[:3])
    assert wanted[3] == 0.0
    for part in two_ranks:
        assert part["norms"] == pytest.approx(wanted, rel=1e-12)


def test_every_field_is_gathered_in_rank_order(two_ranks):
    inputs, _ = batch(0, ROWS)
    whole = plain(Towers()(**inputs))
    for rank in range(2):
        gathered = two_ranks[rank]["outputs"]
        assert gathered.keys() == whole.keys()
        keys = ("image", "text", "has_text", "group", "image_features", "text_features", "bank", "logit_scale")
        for key in (*keys, "text_mask", "masked_image"):
            torch.testing.assert_close(gathered[key], whole[key], msg=key)
            assert gathered[key].dtype == whole[key].dtype
        for key in ("a", "b"):
            torch.testing.assert_close(gathered["taps"][key], whole["taps"][key])


def test_ranks_with_other_fields_are_told_instead_of_hanging(two_ranks):
    assert all("wait for each other" in part["message"] for part in two_ranks)


def test_one_rank_is_the_identity():
    inputs, _ = batch(0, ROWS)
    outputs = Towers()(**inputs)
    assert gather_outputs(outputs) is outputs


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
