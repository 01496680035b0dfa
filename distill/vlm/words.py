"""What a decoder knows of words before it learns: its embedding starts at the vectors of a public sentence encoder.

A name that no picture was shown for then lies near names that were, and the tied output layer with it. Nothing of the
built-in pictures is in those vectors (MiniLM: `teachers.minilm`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.build import seeded
from pocketvlm.students.vlm.model import Vlm

_SPACE = "▁"
_KEY = "vectors"


def word_vectors(pieces: list[str]) -> Tensor:
    """float32 [V, 384]: centred unit vectors of the pieces that begin a word and hold two letters or more, else 0.

    Raises:
        MissingExtraError: the package of the sentence encoder is not installed.
    """
    from pocketvlm.teachers.minilm import MiniLM

    words = {place: piece[1:] for place, piece in enumerate(pieces) if piece[0] == _SPACE and piece[1:].isalpha()}
    words = {place: word for place, word in words.items() if len(word) > 1}
    found = MiniLM.load().embed(list(words.values()))
    vectors = torch.zeros(len(pieces), found.shape[1])
    vectors[list(words)] = F.normalize(found - found.mean(0), dim=-1)
    return vectors


def save_word_vectors(vectors: Tensor, path: Path) -> None:
    """In half precision, for a machine that lacks the sentence encoder."""
    save_file({_KEY: vectors.half()}, path)


def load_word_vectors(path: Path) -> Tensor:
    """float32 [V, 384] of `save_word_vectors`."""
    return load_file(path)[_KEY].float()


@torch.no_grad()
def start_from_words(model: Vlm, vectors: Tensor, *, seed: int = 0) -> int:
    """Set the embedding rows of words, in place, and return how many.

    The vectors are turned into the decoder's width by random orthonormal axes, which keeps their angles as far as
    there are as many; their length is 1, about that of random rows.

    Raises:
        UsageError: vectors of another vocabulary.
    """
    weight = model.decoder.embed_tokens.weight
    if len(vectors) != len(weight):
        raise UsageError(
            f"word vectors for {len(vectors)} pieces were given to a decoder of {len(weight)}; words would start at "
            "other words' meaning, so make them from this very tokenizer"
        )
    with seeded(seed, "words"):
        small, large = sorted((vectors.shape[1], weight.shape[1]))
        axes = torch.linalg.qr(torch.randn(large, small))[0]
    turn = axes.T if vectors.shape[1] == small else axes
    known = vectors.any(dim=1)
    weight[known.to(weight.device)] = F.normalize(vectors[known] @ turn, dim=-1).to(weight)
    return int(known.sum())
