"""Real inputs for int8: a small, stated and repeatable sample of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.data.sample import Sample
from pocketvlm.data.source import DataSource
from pocketvlm.data.splits import group_of, stable_hash
from pocketvlm.data.wordlist import DEFAULT as WORDS
from pocketvlm.data.wordlist import word_list, word_list_licences
from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.targets.base import Calibration

DEFAULT_SIZE = 256
# a quarter judges the result: with fewer, its 1st percentile would be one unlucky picture
MIN_SIZE = 16
# below this many a user is warned; a stated mean and percentile of a quarter of them mean little
FEW = 64
TEMPLATE = "a picture of {}"


def build_calibration(
    data: DataSource | Sequence[Sample],
    contract: ModelContract,
    tokenizer: Tokenizer | None,
    *,
    size: int = DEFAULT_SIZE,
    name: str = "",
) -> Calibration:
    """Pick up to `size` pictures and `size` texts, spread evenly over labels (or groups), by hash of their uid.

    The same data gives the same picks in any order and on any machine. Unreadable pictures are passed over and
    counted in the description. Texts are captions (labels where there is none), every second one inside a prompt,
    because an app sends both. Data with fewer than 16 is filled up from the word list that
    students learn from, as pictures without captions are enough to train on.

    Returns:
        uint8 [n, S, S, 3] and int32 [m, L]; empty arrays for towers that the contract does not have.

    Raises:
        UsageError: `size` too small, or fewer than 16 usable pictures for a tower that needs them.
        MissingExtraError: words are needed and the packages that hold them are not installed.
    """
    samples = list(data)
    name = name or getattr(data, "name", "") or "given samples"
    if size < MIN_SIZE:
        raise UsageError(
            f"calibration size {size} is too small to set ranges and to judge them; use {MIN_SIZE} or more "
            f"({DEFAULT_SIZE} by default)"
        )
    parts, warnings = [], []
    pixels = np.zeros((0, 1, 1, 3), np.uint8)
    picked = hashlib.sha256()
    if contract.image is not None:
        pixels, uids, unreadable, kind, strata = _pictures(samples, contract, size)
        _refuse_few(len(pixels), "readable pictures", name)
        picked.update("\n".join(uids).encode())
        warnings += _doubts(samples, uids, name)
        parts.append(f"{len(pixels)} pictures spread over {strata} {kind} ({unreadable} unreadable passed over)")
    ids = np.zeros((0, 1), np.int32)
    if contract.text is not None:
        if tokenizer is None:
            raise UsageError("a text tower cannot be calibrated without its tokenizer; pass the model's tokenizer")
        found = _texts(samples, size)
        words = _words(tokenizer, size - len(found)) if len(found) < MIN_SIZE else []
        texts = [text if index % 2 == 0 else TEMPLATE.format(text) for index, text in enumerate([*found, *words])]
        ids = tokenizer.encode(texts)
        picked.update("\n".join(texts).encode())
        origin = f" ({len(found)} of the data, {len(words)} of the word list {WORDS})" if words else ""
        parts.append(f"{len(texts)} texts{origin}, every second one as {TEMPLATE!r}")
    description = f"{name}: {' and '.join(parts)}; picked by stable hash, digest {picked.hexdigest()[:16]}"
    return Calibration(pixels, ids, description, tuple(warnings))


def stratified(samples: Sequence[Sample]) -> tuple[list[Sample], str, int]:
    """All samples in an order whose every prefix is spread evenly over strata, the strata's kind, and their number.

    Strata are labels where labels repeat, else categories, else groups. Within a stratum and among strata the order
    is that of a stable hash.
    """
    kind, key = _strata(samples)
    buckets: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: (stable_hash(f"calibration:{sample.uid}"), sample.uid)):
        buckets[key(sample)].append(sample)
    rows = sorted(buckets.items(), key=lambda entry: (stable_hash(f"calibration:{entry[0]}"), entry[0]))
    longest = max((len(bucket) for _, bucket in rows), default=0)
    ordered = [bucket[depth] for depth in range(longest) for _, bucket in rows if depth < len(bucket)]
    return ordered, kind, len(rows)


def _strata(samples: Sequence[Sample]) -> tuple[str, Any]:
    candidates: list[tuple[str, Any]] = [
        ("labels", lambda sample: sample.label or ""),
        ("categories", lambda sample: sample.tags.get("category", "")),
    ]
    for kind, key in candidates:
        distinct = {key(sample) for sample in samples}
        if 2 <= len(distinct) <= len(samples) / 2:
            return kind, key
    return "groups", group_of


def _pictures(
    samples: Sequence[Sample], contract: ModelContract, size: int
) -> tuple[NDArray[np.uint8], list[str], int, str, int]:
    assert contract.image is not None
    ordered, kind, strata = stratified(samples)
    pixels: list[NDArray[np.uint8]] = []
    uids: list[str] = []
    unreadable = 0
    for sample in ordered:
        if len(pixels) == size:
            break
        try:
            pixels.append(load_image(sample.image.read(), contract.image))
        except BadSampleError:
            unreadable += 1
            continue
        uids.append(sample.uid)
    side = contract.image.size
    return np.array(pixels, np.uint8).reshape(-1, side, side, 3), uids, unreadable, kind, min(strata, len(pixels))


def _doubts(samples: Sequence[Sample], uids: Sequence[str], name: str) -> list[str]:
    """What a user should hear of the pictures that were picked, with its consequence."""
    found = []
    if len(uids) < FEW:
        found.append(
            f"{len(uids)} pictures of {name!r} calibrate and judge; ranges rest on few, and the first percentile of "
            f"{len(uids) // 4} that are held out is one picture, so give {FEW} or more"
        )
    picked = set(uids)
    labels = {sample.label for sample in samples if sample.uid in picked}
    if len(labels) == 1 and None not in labels:
        found.append(
            f"all pictures of {name!r} are of one class ({labels.pop()!r}); ranges are set on it alone, and what "
            "others exceed is clipped without a word, so give pictures of all that the app will see"
        )
    return found


def _texts(samples: Sequence[Sample], size: int) -> list[str]:
    ordered, _, _ = stratified(samples)
    found: dict[str, None] = {}
    for sample in ordered:
        choices = [caption.text for caption in sample.captions] or ([sample.label] if sample.label else [])
        for text in choices[:1]:
            if isinstance(text, str) and text.strip():
                found.setdefault(text)
        if len(found) == size:
            break
    return list(found)


def _words(tokenizer: Tokenizer, count: int) -> list[str]:
    """The first `count` of the word list, in the order of a stable hash, that the tokenizer has tokens for."""
    found: list[str] = []
    for text in sorted(word_list(WORDS, size=10 * count), key=lambda text: stable_hash(f"calibration:{text}")):
        if len(found) == count:
            break
        try:
            tokenizer.encode([text])
        except BadSampleError:
            continue
        found.append(text)
    return found


def _refuse_few(count: int, what: str, name: str) -> None:
    if count < MIN_SIZE:
        raise UsageError(
            f"calibration data {name!r} has {count} {what} and at least {MIN_SIZE} are needed; int8 ranges set on "
            "fewer would clip ordinary inputs, so name a data set with more (the one it was trained on will do)"
        )


def open_calibration(
    data: str | Path | DataSource | Sequence[Sample] | Calibration | None,
    contract: ModelContract,
    tokenizer: Tokenizer | None,
    *,
    size: int = DEFAULT_SIZE,
) -> tuple[Calibration | None, DataSource | None]:
    """Whatever a caller gives as calibration data, and its source where there is one (for names and licences).

    A string is a `--data` spec ("openmoji?pool=student&fold=0", a manifest, a folder).
    """
    if data is None or isinstance(data, Calibration):
        return data, None
    source: DataSource | Sequence[Sample]
    if isinstance(data, (str, Path)):
        from pocketvlm.data import open_data

        source = open_data(str(data))
    else:
        source = data
    calibration = build_calibration(source, contract, tokenizer, size=size)
    if not isinstance(source, DataSource):
        return calibration, None
    if WORDS in calibration.description:
        source = dataclasses.replace(source, licences=(*source.licences, *word_list_licences(WORDS)))
    return calibration, source
