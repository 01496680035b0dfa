"""The largest tensor that each objective makes, forward and backward, at two sizes of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pocketvlm.distill.objectives import Outputs, Widths, build_objective, list_objectives

# embedding, places and words, pieces of a vocabulary, classes, masked places of a caption, cells of a picture
D, N, L, V, K, MASKED, CELLS = 32, 16, 8, 300, 5, 2, 4
WIDTHS = Widths(
    D, D, D, taps={"tokens": D, "text.tokens": D, "text.exit.1": D}, token_table=D, text_blocks=2, parts=((D, 20.0),)
)
SIZES = (24, 96)
# pairs of rows as indices are two numbers each, a triangle of them half as many; concatenated embeddings are two wide
FACTOR = 2


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes; views of what is there are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for made in tree_leaves(found):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                numbers = made.untyped_storage().nbytes() // made.element_size()
                if numbers > self.numbers:
                    self.numbers, self.by = numbers, str(func)
        return found


def outputs(seed: int, rows: int) -> Outputs:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).requires_grad_(seed == 0)

    return Outputs(
        image=draw(rows, D),
        text=draw(rows, D),
        has_text=torch.ones(rows, dtype=torch.bool),
        logit_scale=torch.tensor(20.0, requires_grad=seed == 0),
        image_features=draw(rows, D),
        text_features=draw(rows, D),
        taps={"tokens": draw(rows, N, D), "text.tokens": draw(rows, L, D), "text.exit.1": draw(rows, D)},
        bank=draw(rows, D),
        group=torch.arange(rows) // 2,
        text_mask=torch.ones(rows, L, dtype=torch.bool),
        masked_image=draw(rows, D),
        masked_words=draw(rows, MASKED, D),
        masked_pieces=torch.randint(0, V, (rows, MASKED), generator=g),
        token_table=draw(V, D),
        regions=draw(rows, CELLS, D),
        region_targets=draw(rows, CELLS, D),
        region_mask=torch.ones(rows, CELLS, dtype=torch.bool),
        class_logits=draw(rows, K),
        taught_logits=draw(rows, K),
        label=torch.randint(-1, K, (rows,), generator=g),
    )


def largest(name: str, rows: int, *, collapsed: bool = False, **options: Any) -> Largest:
    objective = build_objective(name, student=WIDTHS, teacher=WIDTHS, **options)
    objective.at(3, 0.5)
    student, teacher = outputs(0, rows), outputs(1, rows)
    if collapsed:
        with torch.no_grad():
            student.image[:] = student.image[0].clone()
    with Largest() as seen:
        terms = objective(student=student, teacher=teacher if objective.needs.targets else None)
        sum(terms.values(), torch.zeros(())).backward()
    return seen


# what is not made of pairs of rows and of embeddings: numbers at most, by the batch, and why
APART: dict[str, tuple[Callable[[int], int], str]] = {
    "masked-language": (lambda b: b * MASKED * V, "logits over the vocabulary, of masked places only"),
    "token-alignment": (lambda b: b * b * N * L, "every word with every patch; at most 2^24 at a time"),
    "token-gram": (lambda b: b * N * max(N, D), "the places of each picture with each other, and the maps themselves"),
    "region-self": (lambda b: b * CELLS * D, "the embeddings of a picture's cells"),
    "hint on maps": (lambda b: b * N * D, "the maps themselves"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in list_objectives()},
    "token-alignment": {"width": D},
    "hint on maps": {"student_tap": "tokens", "teacher_tap": "tokens", "places": 1},
}


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_memory_is_that_of_pairs_and_embeddings(name: str, rows: int) -> None:
    """At most `FACTOR` (B^2 + B D) numbers in any one tensor: no B x B x D, and no B x B x B."""
    seen = largest(name.partition(" ")[0], rows, **OPTIONS[name])
    limit = FACTOR * (rows * rows + rows * D)
    if name in APART:
        limit = max(limit, APART[name][0](rows))
    assert seen.numbers <= limit, f"{name} makes {seen.numbers} numbers by {seen.by}"


@pytest.mark.parametrize("name", ["correlation-congruence", "gram", "order", "rkd"])
def test_equal_pictures_need_no_more(name: str) -> None:
    """Of a collapsed student every pair of rows is a special case."""
    rows = SIZES[-1]
    seen = largest(name, rows, collapsed=True)
    assert seen.numbers <= FACTOR * (rows * rows + rows * D), f"{name} makes {seen.numbers} numbers by {seen.by}"


def test_exceptions_are_exceptions() -> None:
    """Each makes more than the others may, at the smaller batch; what no longer does is to be taken off the list."""
    for name in APART:
        seen = largest(name.partition(" ")[0], SIZES[0], **OPTIONS[name])
        assert seen.numbers > FACTOR * (SIZES[0] ** 2 + SIZES[0] * D), f"{name}: {seen.numbers}"


@pytest.mark.parametrize("shape", ["rows x rows x width", "rows x rows x rows"])
def test_the_measure_sees_what_is_too_large(shape: str) -> None:
    for rows in SIZES:
        z = torch.randn(rows, D, requires_grad=True)
        with Largest() as seen:
            if shape.endswith("width"):
                (z[:, None] - z).square().mean().backward()
            else:
                square = z @ z.T
                (square[:, None] - square).square().mean().backward()
        assert seen.numbers > FACTOR * (rows * rows + rows * D)
    with Largest() as seen:
        torch.zeros(rows, 1, D).expand(rows, rows, D)
    assert seen.numbers == rows * D
