"""The tokenizer of generative students: whole words where they are listed, learnt pieces, and bytes for the rest.

A Unigram model whose pieces all cost the same takes the fewest of them, so that a listed word is one token wherever it
stands, in a question or in an answer. Texts are compatibility-folded and lower-cased, and double quotes are dropped, so
that a name is spelled alike with and without them. What no piece spells falls back to UTF-8 bytes: nothing is unknown.

The special tokens have capitals, which no folded text has: a user who types `<EOS>` types letters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.tokenizer import train_tokenizer

SPECIAL = ("<PAD>", "<BOS>", "<EOS>", "<USER>", "<ASSISTANT>", "<UNK>")
PAD, BOS, EOS, USER, ASSISTANT, _UNKNOWN = range(len(SPECIAL))
_SPACE = "▁"
_QUOTES = '"“”„«»'


def train_vlm_tokenizer(texts: Sequence[str], vocab_size: int, *, words: Sequence[str] = ()) -> bytes:
    """A tokenizer.json: special tokens, 256 bytes, every character of the texts, whole words, learnt pieces.

    Equal arguments give equal bytes. A quarter of the vocabulary is left to learnt pieces.

    Args:
        texts: what it should spell in few pieces. words: whole words to hold, most wanted first, as many as fit.

    Raises:
        UsageError: no texts, or a vocabulary too small for their characters.
    """
    folded = [_normaliser().normalize_str(text) for text in texts]
    spelled = [_normaliser().normalize_str(word) for word in words]
    if not any(text.strip() for text in folded):
        raise UsageError("the tokenizer was given no text to learn from; every word would be bytes, so pass some texts")
    characters = sorted({character for text in (*folded, *spelled) for character in text if not character.isspace()})
    pieces = dict.fromkeys([_SPACE, *characters])
    room = vocab_size - len(SPECIAL) - 256
    if len(pieces) > room // 2:
        raise UsageError(
            f"a vocabulary of {vocab_size} cannot hold the special tokens, 256 bytes and {len(pieces)} characters with "
            f"room for words; ask for {2 * len(pieces) + len(SPECIAL) + 256} or more, or pass texts with fewer scripts"
        )
    for word in spelled:
        if len(pieces) >= room * 3 // 4:
            break
        if word and not any(character.isspace() for character in word):
            pieces.setdefault(_SPACE + word)
    # the pieces of a WordPiece trained on the same texts, whose order is stable
    alphabet = 2 * len(characters) + 4
    learnt = json.loads(train_tokenizer([*folded, *spelled], alphabet + room, lowercase=False))["model"]["vocab"]
    short_first = sorted(learnt, key=lambda piece: (len(piece.removeprefix("##")), piece))
    for piece in short_first:
        if len(pieces) >= room:
            break
        if not piece.startswith("["):
            pieces.setdefault(piece[2:] if piece.startswith("##") else _SPACE + piece)
    vocab = [(name, 0.0) for name in SPECIAL] + [(f"<0x{byte:02X}>", -50.0) for byte in range(256)]
    vocab += [(piece, -10.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, _UNKNOWN, byte_fallback=True))
    tokenizer.normalizer = _normaliser()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")]
    )
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode("utf-8")


def _normaliser() -> normalizers.Normalizer:
    quotes = [normalizers.Replace(quote, "") for quote in _QUOTES]
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *quotes])


class VlmTokenizer:
    """Ids of plain text, and the chat template.

    A conversation is `<BOS>`, the picture's tokens, then for each turn `<USER>` question `<ASSISTANT>` answer `<EOS>`.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        """Raises:
        UsageError: not a tokenizer.json of `train_vlm_tokenizer`."""
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # the Rust side raises bare Exception
            raise UsageError(
                f"the tokenizer given is not a tokenizer.json of the tokenizers library ({error})"
            ) from error
        vocab = self._tokenizer.get_vocab()
        if [vocab.get(name) for name in SPECIAL] != list(range(len(SPECIAL))):
            raise UsageError(
                f"the tokenizer given does not begin with {', '.join(SPECIAL)}; turns could not be told apart, so "
                "train one with train_vlm_tokenizer"
            )
        self.json = tokenizer_json
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none of them special."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are left out, bytes that are no UTF-8 become replacement characters."""
        return self._tokenizer.decode([int(i) for i in ids if int(i) >= len(SPECIAL)], skip_special_tokens=False)

    def question(self, text: str) -> list[int]:
        """`<USER>` text `<ASSISTANT>`."""
        return [USER, *self.encode(text), ASSISTANT]

    def answer(self, text: str) -> list[int]:
        """text `<EOS>`."""
        return [*self.encode(text), EOS]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """For each token of `encode(text)`, its first character in the text and the one behind its last.

        The bytes of one character all have its place.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def pieces(self) -> list[str]:
        """Every token as it is spelled, by id; a word's first piece begins with "▁"."""
        return [str(self._tokenizer.id_to_token(i)) for i in range(self.vocab_size)]
