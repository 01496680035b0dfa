"""Every way to leave visual tokens out of a trained model, beside each other: accuracy, operations, time."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pocketvlm.data.scenes import PictureSet, SceneTable
from pocketvlm.distill.vlm.evaluate import Asked, answer_scenes, see_scenes
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students.vlm.condense import possible_keeps, possible_scores
from pocketvlm.students.vlm.config import Reduction
from pocketvlm.students.vlm.flops import decoder_flops, picture_flops
from pocketvlm.students.vlm.model import Vlm

# what a name in a table, or after --methods, stands for: method and score
NAMES: dict[str, tuple[str, str]] = {
    "fastervlm": ("top", "cls"),
    "vtc-cls": ("top", "cls-layers"),
    "fopru-rank": ("top", "received"),
    "fopru-row": ("rows", "received"),
    "distinct": ("top", "distinct"),
    "distinct-rows": ("rows", "distinct"),
    "even": ("even", "distinct"),
    "pitome": ("merge", "distinct"),
    "pool": ("pool", "distinct"),
    "pyramiddrop": ("pyramid", "distinct"),
    "aim": ("aim", "distinct"),
    "connector": ("connector", "distinct"),
}
_QUESTION = "What is at the top left?"
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting measured.

    name: of `NAMES`, or "all tokens". tokens: visual tokens in each decoder layer; mean_tokens: their mean.
    accuracy: share of short answers that are exactly right. kept: that over the accuracy with all tokens, with its
    95 % interval (bootstrap over scenes, both on the same ones). flops, ms: of one picture's prefill with one question,
    "decoder" from visual tokens, "whole" from pixels, to the first answer token; ms: medians of both by the clock and,
    as "decoder_cpu" and "whole_cpu", of processor time, which other work on the machine changes less.
    """

    name: str
    keep: int
    positions: str
    tokens: tuple[int, ...]
    accuracy: float
    kept: float
    interval: tuple[float, float]
    flops: dict[str, int]
    ms: dict[str, float]

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"mean_tokens": round(self.mean_tokens, 2)}


def applicable(model: Vlm, keeps: Sequence[int] = (), methods: Sequence[str] = ()) -> dict[str, list[int]]:
    """Names of `NAMES` that this model can do, with the numbers of tokens each can keep.

    keeps: those of interest; a half, a third, a quarter, a sixth and a ninth of all where empty. methods: names; all
    where empty.

    Raises:
        UnknownNameError: no such method. UsageError: none of them can be done, or none keeps such a number.
    """
    tokens, connector = model.connector.tokens, model.connector
    wanted = list(keeps) or [tokens * 1 // part for part in (2, 3, 4, 6, 9) if tokens // part]
    for name in methods:
        if name not in NAMES:
            raise unknown_name("reduction of visual tokens", name, NAMES)
    found: dict[str, list[int]] = {}
    for name, (method, score) in NAMES.items():
        if methods and name not in methods:
            continue
        if method in ("top", "rows", "even", "pool") and not connector.gridded:
            continue
        if method in ("top", "rows") and score not in possible_scores(model.vision):
            continue
        can = connector.sizes if method == "connector" else possible_keeps(method, tokens)
        numbers = [keep for keep in dict.fromkeys(wanted) if keep in can and keep < tokens]
        if numbers:
            found[name] = sorted(numbers, reverse=True)
    if not found:
        asked = ", ".join(methods) or "every method"
        raise UsageError(
            f"of {tokens} visual tokens {', '.join(map(str, wanted))} were to be kept by {asked}, which this model's "
            "grid, tower or connector does not allow; give other numbers or methods (docs/visual-tokens.md)"
        )
    return found


def reduction_of(name: str, keep: int, positions: str = "kept") -> Reduction:
    """The setting behind a name of `NAMES`."""
    method, score = NAMES[name]
    return Reduction.model_validate({"method": method, "score": score, "keep": keep, "positions": positions})


def sweep(
    model: Vlm,
    pictures: PictureSet,
    *,
    settings: Sequence[tuple[str, Reduction]],
    scenes: int,
    questions: int = 4,
    batch: int = 64,
    rounds: int = 15,
    say: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """Measure the model with all its tokens, first, and with each of the settings.

    The tower sees every scene once; its features serve all settings. Captions are not asked for. rounds: of timing.
    The model's own reduction is put back at the end.

    Raises:
        UsageError: a setting that the model cannot do.
    """
    own = model.reduction
    plan: list[tuple[str, Reduction | None]] = [("all tokens", None), *settings]
    scored = tuple(dict.fromkeys(one.score for _, one in settings if one.scored))
    try:
        for _, wanted in settings:
            model.reduce_tokens(wanted)
        seen = see_scenes(
            model, pictures, SceneTable.build(pictures, model.config.vision.size), scenes=scenes, scored=scored
        )
        whole: list[Asked] = []
        times = prefill_times(model, [reduction for _, reduction in plan], rounds=rounds)
        points = []
        text = len(model.prompt_ids(_QUESTION))
        for (name, reduction), ms in zip(plan, times):
            model.reduce_tokens(reduction)
            begun = time.monotonic()
            with torch.no_grad():
                _, asked = answer_scenes(
                    model, pictures, None, scenes=scenes, questions=questions, batch=batch, seen=seen, captions=False
                )
            whole = whole or asked
            kept, interval = retained(asked, whole)
            flops = decoder_flops(model, text)
            points.append(
                Point(
                    name=name,
                    keep=model.connector.tokens if reduction is None else reduction.keep,
                    positions="kept" if reduction is None else reduction.positions,
                    tokens=model.counts,
                    accuracy=_share(asked),
                    kept=kept,
                    interval=interval,
                    flops={"decoder": flops, "whole": flops + picture_flops(model)},
                    ms=ms,
                )
            )
            point = points[-1]
            say(
                f"{name} {point.keep}: {point.accuracy:.3f} ({point.kept:.3f} of all tokens'), "
                f"{point.ms['decoder']:.1f} ms; {time.monotonic() - begun:.0f} s"
            )
        return points
    finally:
        model.reduce_tokens(own)


def _share(asked: Sequence[Asked]) -> float:
    return sum(row.right for row in asked) / max(len(asked), 1)


def retained(asked: Sequence[Asked], whole: Sequence[Asked]) -> tuple[float, tuple[float, float]]:
    """Accuracy over that of `whole`, the same questions in the same order, and its 95 % interval over scenes."""
    scenes = sorted({row.scene for row in asked})
    place = {scene: number for number, scene in enumerate(scenes)}
    right = np.zeros((2, len(scenes)))
    for side, rows in enumerate((asked, whole)):
        for row in rows:
            right[side, place[row.scene]] += row.right
    rng = np.random.default_rng(0)
    drawn = right[:, rng.integers(0, len(scenes), (_RESAMPLES, len(scenes)))].sum(axis=2)
    shares = drawn[0] / np.maximum(drawn[1], 1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(right[0].sum() / max(right[1].sum(), 1)), (float(low), float(high))


@torch.no_grad()
def prefill_times(
    model: Vlm, reductions: Sequence[Reduction | None], *, rounds: int, question: str = _QUESTION
) -> list[dict[str, float]]:
    """Milliseconds of one picture's prefill, for each setting: medians over rounds in which all take turns.

    "decoder": from visual tokens, "whole": from pixels, both to the first answer token, by the clock; "decoder_cpu" and
    "whole_cpu": the processor time of all threads.
    """
    device = model.decoder.embed_tokens.weight.device
    size = model.config.vision.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, size, size, 3), generator=generator, dtype=torch.uint8).to(device)
    ids = torch.tensor([model.prompt_ids(question)], device=device)
    length = torch.tensor([ids.shape[1]], device=device)
    own = model.reduction
    spent: list[dict[str, list[float]]] = [
        {"decoder": [], "whole": [], "decoder_cpu": [], "whole_cpu": []} for _ in reductions
    ]
    # the first of them warms up
    for turn in range(rounds + 1):
        for reduction, row in zip(reductions, spent):
            model.reduce_tokens(reduction)
            begun = _now(device)
            shown = model.show(model.look(pixels))
            middle = _now(device)
            model.decoder.logits(model.prefill(shown, ids, length)[0]).argmax(-1)
            end = _now(device)
            if turn:
                for clock, suffix in enumerate(("", "_cpu")):
                    row["decoder" + suffix].append(end[clock] - middle[clock])
                    row["whole" + suffix].append(end[clock] - begun[clock])
    model.reduce_tokens(own)
    return [{name: 1000 * statistics.median(values) for name, values in row.items()} for row in spent]


def _now(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()
