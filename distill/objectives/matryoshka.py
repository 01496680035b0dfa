"""Matryoshka: any objective on nested prefixes of the student's embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Objective, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, positive
from pocketvlm.edge.errors import UsageError, unknown_name

_DEFAULT_INNER = {"name": "crd"}
NESTS = ("matryoshka", "matryoshka-2d")
"""Objectives that hold another one on parts of the embedding; neither holds either."""


def prefix(outputs: Outputs, width: int) -> Outputs:
    """The first `width` numbers of every embedding (image, masked, text, bank); features and taps stay as they are."""

    def cut(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[..., :width]

    return dataclasses.replace(
        outputs,
        image=outputs.image[..., :width],
        masked_image=cut(outputs.masked_image),
        text=cut(outputs.text),
        bank=cut(outputs.bank),
    )


def listed_dims(options: Mapping[str, Any]) -> list[int]:
    """The whole numbers in the option `dims`, which nothing has checked yet."""
    dims = options.get("dims")
    return [m for m in dims if isinstance(m, int)] if isinstance(dims, list | tuple) else []


class Matryoshka(BatchObjective):
    """matryoshka: an objective on nested prefixes of the embedding, so that a device may keep only the first numbers.

    Formula: L = sum_m c_m L_inner( z[:m] ), m in `dims`: a *sum*, not a mean, as in MRL. c_m = `weights` (default 1).
    inner: {name, options} of another objective (default crd); it normalises each prefix again by itself.
    dims: increasing widths (default: a quarter, a half and the whole of the student's). Only what is listed is trained:
    list the full width too. `student.overrides.dims` promises the same widths to those who use the student.
    The teacher: keeps its full width, since inner losses of similarities or distributions compare no coordinates; what
    has a projector (`icl`, `cross-kd`, `gradient`, `afd`, `bank` with anchors "teacher"; between unequal widths also
    `feature`, `masked-feature`, `vl2v`) gets one of its own for each m, from m to the teacher's width. Only `momentum`,
    and those last three between equal widths, compare coordinates: there the teacher is cut to m too. A teacher that is
    no Matryoshka model itself has no reason to keep much in its first numbers, so prefer a loss of similarities. A
    student's `bank` that the loop took from the teacher is cut like the student's. What depends on the step is told it
    (`at`).
    Inputs: as the inner objective's; image, text and bank are cut, logit scale shared by all prefixes.
    Output: {"<inner term>_<m>"}, times c_m. Reduction: the inner objective's, and so are temperature,
    KL direction and the fewest rows.
    With dims = [full width] and weight 1 it *is* the inner objective, projectors included.
    Paper: Kusupati et al. 2022 (MRL, 2205.13147), the sum of losses with c_m = 1; there classification with a separate
    head for each m. Ours: the inner distillation losses; a projector for each m, as MRL's heads.
    Refused: an inner objective that reads no embedding of whole pictures or texts (`hint`, `token-gram`,
    `token-alignment`, `masked-language`, `region-self`), `matryoshka` itself.
    Related: `matryoshka-2d` leaves layers of the text tower too; `teacher.axes: principal` gives a teacher whose first
    numbers keep the most.
    Cost: the inner objective's, once for each m; the towers run once.
    """

    name = "matryoshka"
    formula = "sum of c_m × an inner objective on the first m numbers, m in `dims`"
    paper = "MRL, 2205.13147; inner losses ours"
    needs = Needs(captions=True)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        inner: Mapping[str, Any] = _DEFAULT_INNER,
        dims: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        super().__init__()
        from pocketvlm.distill.objectives import build_objective, objective_class

        name, options = inner_of(inner)
        full = student.embedding
        self.dims = _checked_dims(dims, full) if dims else tuple(m for m in (full // 4, full // 2, full) if m > 1)
        self.weights = tuple(positive("weights", weight or 0.0) or 1.0 for weight in weights) or (1.0,) * len(self.dims)
        if len(self.weights) != len(self.dims):
            raise UsageError(
                f"objective 'matryoshka' was given {len(self.weights)} weights for {len(self.dims)} dims; it is "
                "unclear which width counts how much, so give one weight for each width or none"
            )
        cls = objective_class(name)
        as_wide = cls.needs.momentum or (teacher is not None and teacher.embedding == full)
        self.cuts_teacher = cls.coordinates and as_wide
        self.inners = nn.ModuleList()
        for m in self.dims:
            theirs = dataclasses.replace(teacher, embedding=m) if self.cuts_teacher and teacher is not None else teacher
            own = dataclasses.replace(student, embedding=m)
            self.inners.append(build_objective(name, student=own, teacher=theirs, seed=seed, **options))
        first: Any = self.inners[0]
        self.needs, self.minimum_rows = first.needs, first.minimum_rows

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        from pocketvlm.distill.objectives import objective_needs

        name, inner_options = inner_of(options.get("inner", _DEFAULT_INNER))
        return objective_needs(name, inner_options)

    def at(self, step: int, progress: float) -> None:
        for inner in self.inners:
            cast(Objective, inner).at(step, progress)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        found = {}
        for m, weight, inner in zip(self.dims, self.weights, self.inners):
            theirs = (prefix(teacher, m) if self.cuts_teacher else teacher) if self.needs.targets else None
            for key, value in inner(student=prefix(student, m), teacher=theirs).items():
                found[f"{key}_{m}"] = weight * value
        return found


def inner_of(inner: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of the inner objective, checked as far as the wrapper is concerned."""
    from pocketvlm.distill.objectives import objective_class

    if not isinstance(inner, Mapping) or "name" not in inner:
        raise UsageError(
            f"objective option 'inner' is {inner!r} but must be a mapping with a name, such as {{name: crd}}; there is "
            "nothing to apply to the prefixes, so name an objective"
        )
    for key in inner:
        if key not in ("name", "options"):
            raise unknown_name("key of objective option 'inner'", str(key), ("name", "options"))
    given = inner.get("options") or {}
    if not isinstance(given, Mapping):
        raise UsageError(
            f"options of objective option 'inner' are {given!r} but must be a mapping, such as {{duplicates: ignore}}; "
            "none could be set, so write one, or leave them out"
        )
    name, options = inner["name"], dict(given)
    cls = objective_class(name)
    needs = cls.needs
    apart = needs.features or needs.taps or needs.masked_text or needs.regions or needs.classes
    if cls.name in NESTS or apart:
        why = (
            "would nest prefixes twice"
            if cls.name in NESTS
            else "reads no embedding of whole pictures or texts, so every prefix would be the same"
        )
        raise UsageError(f"objective 'matryoshka' cannot hold {name!r}, which {why}; name a loss of the embeddings")
    return name, options


def _checked_dims(dims: Any, full: int) -> tuple[int, ...]:
    whole = isinstance(dims, Sequence) and all(isinstance(m, int) and not isinstance(m, bool) for m in dims)
    if not whole or list(dims) != sorted(set(dims)) or dims[0] < 2 or dims[-1] > full:
        raise UsageError(
            f"objective option 'dims' is {dims!r} but must be increasing whole numbers from 2 (one number is only a "
            f"sign) to {full}, the student's width; other prefixes do not exist, so correct the list"
        )
    return tuple(dims)
