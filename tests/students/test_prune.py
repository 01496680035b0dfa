"""Pruning: what is chosen, that surgery computes what masking computes, and that the result survives its folder."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.students import Student, build_student, load_student, save_student, train_tokenizer
from pocketvlm.students.blocks import parts_of
from pocketvlm.students.prune import (
    Module,
    Pruned,
    blocks_of,
    keep_best,
    keep_first,
    magnitude_ranking,
    modules_of,
    mope_ranking,
    prune,
    spaced_blocks,
    without,
)
from pocketvlm.students.student import weights_digest

TEXTS = ["a red apple", "banana on a table", "grinning face", "grinning cat face", "red table"]
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
KINDS = {
    "pre-norm": {},
    "causal": {"text.attention": "causal", "text.pool": "eot", "text.activation": "quick_gelu"},
    "bert": {"text.block": "bert"},
}


def toy(kind: str = "pre-norm", **changes: object) -> Student:
    overrides = {
        "image.size": 32, "image.backbone_args": VIT, "text.width": 16, "text.heads": 4, "text.layers": 3,
        "text.mlp_ratio": 1.5, "text.context_length": 10, **KINDS[kind], **changes,
    }  # fmt: skip
    tokenizer = train_tokenizer(TEXTS, 80)
    student = build_student("vit-tiny", embed_dim=12, tokenizer_json=tokenizer, seed=1, overrides=overrides).eval()
    # biases and norms that do something: a forgotten one would go unseen at 0 and 1
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return student


def inputs(student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = student.image_spec.size
    pixels = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, generator=generator)
    ids = torch.randint(4, 40, (3, 10), dtype=torch.int32, generator=generator)
    ids[1, 6:] = student.text_spec.pad_id
    return pixels, ids


def embeddings(student: Student) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, ids = inputs(student)
    with torch.no_grad():
        return student.encode_image(pixels).embedding, student.encode_text(ids).embedding


@contextmanager
def masked(student: Student, pruned: Pruned, groups: int) -> Iterator[None]:
    """An independent mask: inputs of the output layers are zeroed by hooks, and dropped blocks return what they got."""
    with ExitStack() as stack:

        def zero(layer: torch.nn.Module, keep: torch.Tensor) -> None:
            hook = layer.register_forward_pre_hook(lambda _, given: (given[0] * keep.to(given[0]),))
            stack.callback(hook.remove)

        for tower, left in pruned.kept.items():
            kept = {block.number: block for block in left}
            for number, block in enumerate(blocks_of(student, tower)):
                if number not in kept:
                    hook = block.register_forward_hook(lambda _, given, __: given[0])
                    stack.callback(hook.remove)
                    continue
                parts = parts_of(block)
                heads = torch.zeros(parts.heads, parts.head_width)
                heads[kept[number].heads] = 1
                zero(parts.out, heads.flatten())
                if kept[number].mlp_groups is not None:
                    share = parts.fc2.in_features / groups
                    assert share == int(share), "the oracle splits evenly"
                    units = torch.zeros(groups, int(share))
                    units[kept[number].mlp_groups] = 1
                    zero(parts.fc2, units.flatten())
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_surgery_equals_masking_and_the_folder_rebuilds_it(kind: str, tmp_path: Path) -> None:
    student = toy(kind).double()
    before = weights_digest(student)
    pruned = prune(student, method="random", keep_heads=0.5, keep_mlp=0.5, keep_depth=0.7, groups=4, seed=2)
    assert weights_digest(student) == before, "the original stays as it is"
    assert len(pruned.kept["image"]) == 3
    assert len(pruned.kept["text"]) == 2
    with masked(student, pruned, 4):
        wanted = embeddings(student)
    found = embeddings(pruned.student)
    whole = embeddings(student)
    for own, expected, unpruned in zip(found, wanted, whole):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
        assert (own - unpruned).abs().max() > 1e-3
    again = load_student(save_student(pruned.student, tmp_path / "pruned"))
    assert again.config == pruned.student.config
    assert all(torch.equal(own, other) for own, other in zip(embeddings(again), found))
    # uneven heads and units are what the configuration has to describe
    assert len({block.heads for block in pruned.student.config.image.blocks}) > 1


@pytest.mark.parametrize(("tower", "kind"), itertools.product(("image", "text"), ("head", "mlp", "block")))
def test_one_module_without_its_output_is_surgery_on_it_alone(tower: str, kind: str) -> None:
    """The scores that ranking is made of are those of the models that surgery makes."""
    student = toy().double()
    place = ("image", "text").index(tower)
    keep = {"head": {"keep_heads": 0.75}, "mlp": {"keep_mlp": 0.75}, "block": {"keep_depth": 0.6}}[kind]
    modules = modules_of(student, tower, kind, 4)  # type: ignore[arg-type]
    before = weights_digest(student)
    seen: list[torch.Tensor] = []
    for module in modules:
        with without(student, module, 4):
            seen.append(embeddings(student)[place])
        assert (seen[-1] - embeddings(student)[place]).abs().max() > 1e-6, f"{module} does something"
    assert weights_digest(student) == before
    pruned = prune(student, method="prefix", groups=4, towers=(tower,), **keep)
    # all dropped ones removed at once, one context around the other
    left = {block.number: block for block in pruned.kept[tower]}
    gone = [
        m
        for m in modules
        if m.block not in left
        or (kind == "head" and m.index not in left[m.block].heads)
        or (kind == "mlp" and m.index not in (left[m.block].mlp_groups or ()))
    ]
    assert 0 < len(gone) < len(modules)
    with ExitStack() as stack:
        for module in gone:
            stack.enter_context(without(student, module, 4))
        wanted = embeddings(student)[place]
    torch.testing.assert_close(embeddings(pruned.student)[place], wanted, rtol=0, atol=1e-12)


def test_mope_removes_what_the_score_does_not_miss() -> None:
    """Z looks at three heads, two groups and one block of each tower only; those must stay and rank by their worth."""
    student = toy()
    worth = {
        Module("image", "head", 1, 3): 3.0,
        Module("image", "head", 3, 0): 2.0,
        Module("text", "head", 2, 2): 1.0,
        Module("image", "mlp", 2, 1): 4.0,
        Module("text", "mlp", 0, 3): 5.0,
    }
    calls: list[str | None] = []

    def score(model: Student, changed: str | None) -> float:
        calls.append(changed)
        total = 0.0
        for module, value in worth.items():
            parts = parts_of(blocks_of(model, module.tower)[module.block])
            inner = parts.head_width if module.kind == "head" else parts.fc2.in_features // 4
            layer = parts.out if module.kind == "head" else parts.fc2
            columns = slice(module.index * inner, (module.index + 1) * inner)
            total += value * float(layer.weight[:, columns].abs().max() > 0)
        return total

    modules = [
        m for tower in ("image", "text") for kind in ("head", "mlp") for m in modules_of(student, tower, kind, 4)
    ]  # type: ignore[arg-type]
    ranking = mope_ranking(student, modules, score, 4)
    assert {module: value for module, value in ranking.items() if value} == worth
    assert calls == [None, *(module.tower for module in modules)]
    kept = keep_best({m: v for m, v in ranking.items() if (m.tower, m.kind) == ("image", "head")}, 8)
    assert {Module("image", "head", 1, 3), Module("image", "head", 3, 0)} < kept


@torch.no_grad()
def test_magnitude_is_the_norm_of_what_is_removed() -> None:
    student = toy()
    parts = parts_of(blocks_of(student, "text")[1])
    width = parts.head_width
    wanted = 0.0
    for part in range(3):
        for row in range(width):
            place = part * 4 * width + 2 * width + row
            wanted += sum(float(x) ** 2 for x in parts.qkv.weight[place]) + float(parts.qkv.bias[place]) ** 2
    for column in range(2 * width, 3 * width):
        wanted += sum(float(x) ** 2 for x in parts.out.weight[:, column])
    head = Module("text", "head", 1, 2)
    units = Module("text", "mlp", 1, 3)
    found = magnitude_ranking(student, [head, units], 4)
    assert found[head] == pytest.approx(wanted**0.5, rel=1e-6)
    wanted = 0.0
    for unit in range(18, 24):  # the last of four groups of 24
        wanted += sum(float(x) ** 2 for x in parts.fc1.weight[unit]) + float(parts.fc1.bias[unit]) ** 2
        wanted += sum(float(x) ** 2 for x in parts.fc2.weight[:, unit])
    assert found[units] == pytest.approx(wanted**0.5, rel=1e-6)


def test_choices() -> None:
    ranking = {Module("text", "head", block, index): float(block) for block in range(3) for index in range(4)}
    kept = keep_best(ranking, 6)
    # the first two blocks keep their best one although the last ones are worth more
    assert sorted((m.block, m.index) for m in kept) == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert len(keep_best(ranking, 1)) == 3
    assert sorted((m.block, m.index) for m in keep_first(list(ranking), 0.5)) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    # range(0, d_s * step, step) with step = d_t // d_s
    assert spaced_blocks(12, 6) == [0, 2, 4, 6, 8, 10]
    assert spaced_blocks(12, 4) == [0, 3, 6, 9]
    assert spaced_blocks(12, 9) == list(range(9))


def test_all_methods_keep_equally_many() -> None:
    student = toy()
    sizes = set()
    for method in ("mope", "magnitude", "prefix", "random"):
        found = prune(
            student, method=method, keep_heads=0.5, keep_mlp=0.5, keep_depth=0.5, groups=4, score=lambda *_: 1.0
        )
        assert found.scores == {"before": 1.0, "after width": 1.0, "after depth": 1.0}
        blocks = [block for tower in ("image", "text") for block in found.kept[tower]]
        assert [len(found.kept[tower]) for tower in ("image", "text")] == [2, 2]
        sizes.add(sum(len(block.heads) for block in blocks) if method == "prefix" else len(found.ranking))
    assert sizes == {8, 28 + 28 + 7}


def test_a_text_ends_at_its_end_token_whatever_the_padding_is() -> None:
    student = toy("causal", **{"text.end_id": 7})
    ids = torch.tensor([[2, 0, 9, 7, 0, 0, 0, 0, 0, 0], [2, 0, 9, 7, 7, 8, 7, 9, 3, 3]], dtype=torch.int32)
    with torch.no_grad():
        both = student.encode_text(ids).embedding
        cut = student.encode_text(ids[:1, :4]).embedding
        other = student.encode_text(torch.tensor([[2, 5, 9, 7]], dtype=torch.int32)).embedding
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(both[:1], cut, rtol=0, atol=1e-6)
    assert (cut - other).abs().max() > 1e-4, "a pad id inside the text is a token like any other"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"method": "mop", "keep_depth": 0.5}, UnknownNameError, "did you mean 'mope'"),
        ({"method": "prefix", "keep_heads": 0.0}, UsageError, "keep_heads is 0 but must be more than 0"),
        ({"method": "prefix", "keep_mlp": 1.5}, UsageError, "keep_mlp is 1.5"),
        ({"method": "prefix"}, UsageError, "nothing would be pruned"),
        ({"method": "prefix", "keep_depth": 0.5, "towers": ("pictures",)}, UnknownNameError, "unknown tower"),
        ({"method": "prefix", "keep_depth": 0.5, "towers": ()}, UsageError, "nothing would be pruned"),
        ({"method": "mope", "keep_depth": 0.5}, UsageError, "drop of a score and was given none"),
        ({"method": "prefix", "keep_mlp": 0.5, "groups": 1}, UsageError, "groups is 1"),
        ({"method": "prefix", "keep_mlp": 0.5, "groups": 99}, UsageError, "48 hidden units, which cannot be split"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        prune(toy(), **options)  # type: ignore[arg-type]


def test_towers_without_heads_are_refused() -> None:
    tokenizer = train_tokenizer(TEXTS, 80)
    tiny = {"image.size": 32, "text.width": 16, "text.layers": 0, "text.context_length": 10}
    student = build_student("mnv4-035", embed_dim=12, tokenizer_json=tokenizer, overrides=tiny)
    with pytest.raises(UsageError, match="not made of plain transformer blocks"):
        prune(student, method="prefix", keep_depth=0.5)
    with pytest.raises(UsageError, match="has no layers"):
        prune(student, method="prefix", keep_depth=0.5, towers=("text",))
    with pytest.raises(UsageError, match="name blocks by number"):
        prune(toy(**{"image.levels": [1]}), method="prefix", keep_depth=0.5)
    # the text tower alone of a student with a CNN
    tiny["text.layers"] = 2
    student = build_student("mnv4-035", embed_dim=12, tokenizer_json=tokenizer, overrides=tiny)
    assert len(prune(student, method="prefix", keep_depth=0.5, towers=("text",)).student.text_tower.blocks) == 1


def test_configurations_that_no_pruning_makes_are_refused() -> None:
    widths = [{"heads": 1, "hidden": 8}] * 5
    with pytest.raises(UsageError, match=r"text\.blocks describes 5 blocks but text.layers is 3"):
        toy(**{"text.blocks": widths})
    with pytest.raises(UsageError, match=r"image\.blocks describes 5 blocks but 'vit_tiny_patch16_224' has 4"):
        toy(**{"image.blocks": widths})
    with pytest.raises(UsageError, match="unknown student key"):
        toy(**{"image.blocks": [{"head": 1, "heads": 1, "hidden": 8}]})
    with pytest.raises(UsageError, match=r"image\.blocks describes a pruned tower"):
        toy(**{"image.blocks": widths[:1], "image.weights": "file:x"})


def test_the_table_in_the_docs_is_the_committed_result() -> None:
    root = Path(__file__).resolve().parents[2]
    result = json.loads((root / "benchmarks" / "results" / "inherited.json").read_text(encoding="utf-8"))
    text = (root / "docs" / "students.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \|(.*)\|$", text.partition("<!-- inherited:begin -->")[2], re.M)
    wanted = {}
    for method, row in result["R@5"]["50 %"].items():
        cells = [f"{result['width_only'][method]['test']:.1f}", f"{row['test before']:.1f}", f"{row['test after']:.1f}"]
        cells += [f"{row['validation before']:.1f}", f"{row['validation after']:.1f}"]
        gap = result["mope_minus"]["50 %"].get(method, {}).get("after", {}).get("test")
        cells.append("–" if gap is None else f"{gap['difference']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})")
        wanted[method] = cells
    assert {method: [cell.strip() for cell in cells.split("|")] for method, cells in shown} == wanted
