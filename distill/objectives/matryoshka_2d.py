"""Two-dimensional Matryoshka: an objective on prefixes of what inner layers of the text tower give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Objective, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, kl_rows, not_negative, tap_of
from pocketvlm.distill.objectives.matryoshka import _DEFAULT_INNER, Matryoshka
from pocketvlm.edge.errors import UsageError


def listed_pairs(options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The pairs of whole numbers in the option `pairs`, which nothing has checked yet."""
    pairs = options.get("pairs")
    whole = [pair for pair in pairs if isinstance(pair, list | tuple)] if isinstance(pairs, list | tuple) else []
    return [(pair[0], pair[1]) for pair in whole if len(pair) == 2 and all(isinstance(n, int) for n in pair)]


def listed_layers(options: Mapping[str, Any]) -> list[int]:
    """The layers of `pairs`, each once; where there are none, that of the default."""
    return list(dict.fromkeys(layer for layer, _ in listed_pairs(options) or [(1, 0)]))


def exit_tap(layer: int) -> str:
    """The tap of the text tower that is its embedding after `layer` layers."""
    return f"exit.{layer}"


class Matryoshka2D(BatchObjective):
    """matryoshka-2d: an objective on the whole student and on smaller ones inside it, text layers by numbers.

    Formula: with s_l the text embedding after l layers of the tower (its own final norm, pooling and projection, shared
    by all l), s that of the whole tower, v the image embedding, D its width,
        L = L_inner(v, s) + sum_{(l,m) in pairs} [ L_inner(v[:m], s_l[:m]) + kl KL( p(s[:m]) || p(s_l[:m]) ) ],
    p the softmax over coordinates.
    All pairs are used in every step. p is of the numbers as they come, not normalised and without a temperature;
    KL direction: whole || exit; `kl` 0.3 (0 leaves it out). `detach` (default true) keeps the KL from moving the whole
    towards its exits.
    inner: {name, options} of another objective (default crd), cut to m numbers as `matryoshka` does, with its teacher
    and projectors. pairs: smaller models as [layers, numbers] (default: one layer, half of the numbers); the whole is
    always trained. `student.overrides.exits` promises pairs to those who use the student (`students.truncated`). The
    image tower stays whole: the stages of a convolutional network have other widths, so it has no such exits.
    Inputs: the inner objective's, and the taps "text.exit.L" [B, D] of the student, where rows without a caption do not
    count. Output: {"<inner term>"}, {"<inner term>_<l>x<m>"}, {"kl_<l>x<m>"}.
    Reduction: the inner objective's; KL: sum over m coordinates, mean over captioned rows. Temperature: the inner's.
    Paper: Zhuang et al. 2024 (Starbucks, 2410.13230), its released STS loss: fixed pairs, all of them in every step,
    the weight 0.3, no temperature inside; there the KL's teacher is not detached (`detach: false`), and is in the
    retrieval loss, whose KL is of scores and is not here. After 2DMSE (Li et al. 2024, 2402.14776), which draws a layer
    and a width at random. Ours: the inner losses between pictures and texts; exits in the text tower alone.
    Refused: an inner objective that reads no embedding, or only masked pictures.
    Related: `matryoshka` cuts numbers alone, and costs no exits.
    Cost: the inner objective's, once for each pair; a projection of each exit; the towers run once.
    """

    name = "matryoshka-2d"
    formula = (
        "an inner objective on the whole, and on the text tower left after l layers, first m numbers, (l, m) in "
        "`pairs`; + 0.3 KL(whole ‖ exit) over coordinates"
    )
    paper = "Starbucks, 2410.13230; inner losses, exits in the text tower alone ours"
    needs = Needs(captions=True)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        inner: Mapping[str, Any] = _DEFAULT_INNER,
        pairs: Sequence[Sequence[int]] = (),
        kl: float = 0.3,
        detach: bool = True,
    ) -> None:
        super().__init__()
        full = student.embedding
        self.pairs_of = _checked_pairs(pairs, full) if pairs else ((1, max(full // 2, 2)),)
        self.kl, self.detach = not_negative("kl", kl), detach
        for layer in {layer for layer, _ in self.pairs_of}:
            student.tap(self.name, "student", f"text.{exit_tap(layer)}")
        self.heads = nn.ModuleList(
            Matryoshka(student=student, teacher=teacher, seed=seed, inner=inner, dims=(m,))
            for m in (full, *(m for _, m in self.pairs_of))
        )
        first: Any = self.heads[0]
        self.needs, self.minimum_rows = _with_captions(first.needs), first.minimum_rows

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        inner = options.get("inner", _DEFAULT_INNER)
        needs = Matryoshka.needs_with({"inner": inner})
        if needs.masked_view:
            raise UsageError(
                f"objective {cls.name!r} cannot hold {inner['name']!r}, which reads no text, so every exit would be "
                "the same; name a loss of the embeddings"
            )
        return _with_captions(needs)

    def at(self, step: int, progress: float) -> None:
        for head in self.heads:
            cast(Objective, head).at(step, progress)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        given = teacher if self.needs.targets else None
        whole, *heads = self.heads
        found = {_term(key): value for key, value in whole(student=student, teacher=given).items()}
        rows = self.pairs(student, None)
        for (layer, m), head in zip(self.pairs_of, heads):
            text = tap_of(self.name, student, "student", f"text.{exit_tap(layer)}")
            early = dataclasses.replace(student, text=None if student.text is None else text)
            for key, value in head(student=early, teacher=given).items():
                found[f"{_term(key)}_{layer}x{m}"] = value + text.reshape(-1)[:0].sum()
            if not self.kl:
                continue
            if rows is None:
                found[f"kl_{layer}x{m}"] = self.zero(student) + text.reshape(-1)[:0].sum()
                continue
            target = rows.text[:, :m].detach() if self.detach else rows.text[:, :m]
            own = text if rows.keep is None else text[rows.keep]
            found[f"kl_{layer}x{m}"] = self.kl * kl_rows(target, own[:, :m])
        return found


def _term(key: str) -> str:
    """An inner term's name without the width that `matryoshka` puts behind it."""
    return key.rpartition("_")[0]


def _with_captions(needs: Needs) -> Needs:
    return dataclasses.replace(needs, captions=True)


def _checked_pairs(pairs: Any, full: int) -> tuple[tuple[int, int], ...]:
    found = listed_pairs({"pairs": pairs})
    good = all(layer >= 1 and 2 <= m <= full for layer, m in found) and len(set(found)) == len(found)
    if len(found) != len(pairs) or not good:
        raise UsageError(
            f"objective option 'pairs' is {pairs!r} but must list different [layers, numbers], layers from 1 and "
            f"numbers from 2 to {full}, the student's width; other smaller students do not exist, so correct the list"
        )
    return tuple(found)
