"""New languages for a student that reads English: more pieces, whose embeddings start from aligned translations."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.build import assemble
from pocketvlm.students.student import Student
from pocketvlm.students.tokenizer import train_tokenizer

ROUNDS = 6
"""Steps of expectation-maximisation; the likelihood of IBM Model 1 has one optimum, and these come near it."""

Ids = list[NDArray[np.int64]]


def add_languages(student: Student, pairs: Sequence[tuple[str, str]], pieces: int, *, seed: int = 0) -> Student:
    """A copy of `student` that also spells other languages, as if it read them word by word.

    The tokenizer keeps its pieces and their ids; up to `pieces` are learnt from the texts and appended where they are
    new. The embedding of a new piece f starts at sum_e p(e|f) row(e): the rows of the English pieces e that it stands
    beside, weighted by IBM Model 1 (Brown et al. 1993, with p(e|f) in the direction that a row needs; `translations`).
    New pieces that no pair aligns start at the mean of the old rows. Everything else is the student's.

    Args:
        student: its tokenizer is a WordPiece. pairs: (text, its English). pieces: 1 or more. seed: draws nothing that
            stays, all weights are set.

    Raises:
        UsageError: no pairs, another kind of tokenizer, or too few `pieces` for the alphabets of the texts.
    """
    if not pairs:
        raise UsageError("no parallel text was given, so there is no language to add; give data.parallel some sources")
    english = Tokenizer.from_str(student.tokenizer_json.decode())
    joint_json = extend_tokenizer(student.tokenizer_json, [text for text, _ in pairs], pieces)
    joint = Tokenizer.from_str(joint_json.decode())
    own = student.text_tower.token.weight
    old, new = len(own), joint.get_vocab_size(with_added_tokens=True)
    result = assemble(
        student.config, student.embed_dim, joint_json, seed=seed, space_id=student.space_id, load_weights=False
    )
    foreign, beside = (_ids(t, texts) for t, texts in zip((joint, english), zip(*pairs), strict=True))
    f, e, p = translations(foreign, beside, new)
    rows = own.detach().double()
    table = rows.mean(dim=0).repeat(new, 1)
    aligned = torch.zeros_like(table).index_add_(
        0, torch.from_numpy(f), torch.from_numpy(p)[:, None] * rows[torch.from_numpy(e)]
    )
    known = torch.from_numpy(np.unique(f))
    table[known] = aligned[known]
    table[:old] = rows
    state = student.state_dict()
    state["text_tower.token.weight"] = table.to(own.dtype)
    result.load_state_dict(state)
    return result


def extend_tokenizer(tokenizer_json: bytes, texts: Sequence[str], pieces: int) -> bytes:
    """The WordPiece tokenizer.json with up to `pieces` pieces of `texts` appended (`train_tokenizer` finds them).

    Raises:
        UsageError: not a WordPiece, or too few `pieces` for the alphabet of the texts.
    """
    description = json.loads(tokenizer_json)
    if description["model"].get("type") != "WordPiece":
        raise UsageError(
            f"a tokenizer of the kind {description['model'].get('type')!r} takes no new pieces by themselves, as its "
            "merges or scores would not fit them; use a WordPiece (tokenizer.source texts or minilm-l6)"
        )
    vocab = description["model"]["vocab"]
    for piece in json.loads(train_tokenizer(texts, pieces))["model"]["vocab"]:
        vocab.setdefault(piece, len(vocab))
    return json.dumps(description, ensure_ascii=False, indent=1).encode("utf-8")


def translations(
    foreign: Ids, english: Ids, size: int, rounds: int = ROUNDS
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """(f, e, p): p(e|f) of IBM Model 1 for every pair of pieces that occur beside each other; sums to 1 for each f.

    foreign, english: pieces of each pair. size: above every piece of `foreign`. Each English piece of a pair is taken
    to come from one of the pair's foreign pieces, all equally likely beforehand, none from nowhere.
    """
    lengths = [(len(a), len(b)) for a, b in zip(foreign, english, strict=True)]
    none = np.zeros(0, np.int64)
    f = np.concatenate([none, *(np.repeat(a, len(b)) for a, b in zip(foreign, english))])
    e = np.concatenate([none, *(np.tile(b, len(a)) for a, b in zip(foreign, english))])
    first = np.cumsum([0, *(b if a else 0 for a, b in lengths)])
    slot = np.concatenate([none, *(np.tile(np.arange(b), a) + start for (a, b), start in zip(lengths, first))])
    width = int(e.max(initial=0)) + 1
    keys, place = np.unique(f * width + e, return_inverse=True)
    f_of, e_of = keys // width, keys % width
    p = np.ones(len(keys))
    for _ in range(rounds):
        share = p[place] / np.bincount(slot, p[place], minlength=int(first[-1]))[slot]
        counts = np.bincount(place, share, minlength=len(keys))
        p = counts / np.bincount(f_of, counts, minlength=size)[f_of]
    return f_of, e_of, p


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [np.array(found.ids, np.int64) for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
