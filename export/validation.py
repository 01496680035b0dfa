"""Pictures with known captions that calibration has not seen, and what a change of embeddings does to finding them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.data.sample import Sample
from pocketvlm.data.source import DataSource
from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.calibration import stratified
from pocketvlm.export.compare import PairedChange, paired_change, target_ranks

# fewer pictures would call every ranking equal
MIN_PICTURES = 64
DEFAULT_PICTURES = 1024
KS = (1, 5, 10)


@dataclass(frozen=True)
class Validation:
    """pixels: uint8 [n, S, S, 3]. ids: int32 [m, L], one distinct caption each. positives: bool [n, m], at least one in
    every row and column. description: where they are from."""

    pixels: NDArray[np.uint8]
    ids: NDArray[np.int32]
    positives: NDArray[np.bool_]
    description: str

    def rows(self, tower: str) -> NDArray[Any]:
        """The inputs of one tower."""
        return self.pixels if tower == "image" else self.ids

    def first(self, count: int) -> Validation:
        """Fewer pictures, and only their captions."""
        columns = self.positives[:count].any(axis=0)
        return Validation(self.pixels[:count], self.ids[columns], self.positives[:count, columns], self.description)


def build_validation(
    data: DataSource | Sequence[Sample],
    contract: ModelContract,
    tokenizer: Tokenizer,
    *,
    calibration: int,
    size: int = DEFAULT_PICTURES,
) -> Validation:
    """Up to `size` captioned pictures of the data, spread like a calibration sample and without its pictures.

    calibration: how many pictures `build_calibration` takes of the same data; it takes the first readable ones in the
    order of `stratified`, and these are passed over.

    Raises:
        UsageError: fewer than 64 pictures with a caption are left.
    """
    ordered, _, _ = stratified(list(data))
    spec = contract.image
    assert spec is not None, "the caller has refused a single tower"
    taken, picked = 0, hashlib.sha256()
    pixels: list[NDArray[np.uint8]] = []
    captions: list[list[str]] = []
    for sample in ordered:
        texts = [caption.text for caption in sample.captions] or ([sample.label] if sample.label else [])
        if len(pixels) == size or (taken >= calibration and not texts):
            continue
        try:
            picture = load_image(sample.image.read(), spec)
            if taken < calibration:
                taken += 1
                continue
            tokenizer.encode(texts[:1])
        except BadSampleError:
            continue
        pixels.append(picture)
        captions.append(texts)
        picked.update(f"{sample.uid}\n".encode())
    name = getattr(data, "name", "") or "given samples"
    if len(pixels) < MIN_PICTURES:
        raise UsageError(
            f"{name} has {len(pixels)} captioned pictures beside the {taken} that calibrate and {MIN_PICTURES} are "
            "needed; a change in finding them could not be told from chance, so name a larger data set (--data)"
        )
    column = {text: index for index, text in enumerate(dict.fromkeys(texts[0] for texts in captions))}
    positives = np.zeros((len(pixels), len(column)), bool)
    for row, texts in enumerate(captions):
        positives[row, [column[text] for text in texts if text in column]] = True
    description = (
        f"{name}: {len(pixels)} pictures and {len(column)} captions that calibration does not use, "
        f"digest {picked.hexdigest()[:16]}"
    )
    return Validation(np.stack(pixels), tokenizer.encode(list(column)), positives, description)


def task_scores(
    image: NDArray[Any], text: NDArray[Any], validation: Validation
) -> list[tuple[NDArray[np.float64], Any]]:
    """(scores [queries, gallery], positives) of both directions, image to text first."""
    scores = image.astype(np.float64) @ text.astype(np.float64).T
    return [(scores, validation.positives), (scores.T, validation.positives.T)]


def ranks(image: NDArray[Any], text: NDArray[Any], validation: Validation) -> NDArray[np.int64]:
    """The rank of each query's best positive, of both directions one after the other."""
    return np.concatenate([target_ranks(*each) for each in task_scores(image, text, validation)])


def changes(before: NDArray[np.int64], after: NDArray[np.int64]) -> dict[int, PairedChange]:
    """What happened to R@1, R@5 and R@10 of the same queries."""
    found = {}
    for k in KS:
        hit, still = before <= k, after <= k
        found[k] = paired_change(int((hit & ~still).sum()), int((~hit & still).sum()), len(before), resamples=200)
    return found


def margins(image: NDArray[Any], text: NDArray[Any], validation: Validation, k: int = 5) -> NDArray[np.float64]:
    """By how much each query's best positive is ahead of the k-th best other result, in units of the cosine: it is a
    hit at k where this is positive, and how near that is to changing is seen long before it does."""
    found = []
    for scores, positives in task_scores(image, text, validation):
        best = np.where(positives, scores, -np.inf).max(axis=1)
        others = np.where(positives, -np.inf, scores)
        found.append(best - np.partition(others, -k, axis=1)[:, -k])
    return np.concatenate(found)
