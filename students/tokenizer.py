"""Tokenizers of students: train a WordPiece from texts, read one, derive the text contract."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.config import TextConfig

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_FAMILIES = {"WordPiece": "wordpiece", "BPE": "bpe", "Unigram": "unigram"}


def train_tokenizer(texts: Sequence[str], vocab_size: int, *, lowercase: bool = True) -> bytes:
    """A WordPiece tokenizer.json: [PAD]=0 [UNK]=1 [CLS]=2 [SEP]=3, texts wrapped as [CLS] ... [SEP].

    Equal texts give equal bytes on every run. The `tokenizers` trainer alone does not promise that: it numbers the
    characters in hash-map order, which then decides ties. Here the whole alphabet is listed first.

    Args:
        texts: anything the student should spell well (a word list, captions). Order and repetition count as frequency
            only. vocab_size: the result may be smaller when the texts hold fewer pieces.

    Raises:
        UsageError: no texts, or a vocabulary that cannot hold the texts' alphabet.
    """
    tokenizer = _blank(models.WordPiece(unk_token="[UNK]"), lowercase)
    words = [
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    ]
    if not words:
        raise UsageError(
            "the tokenizer was given no text to learn from; every word would be unknown, so pass some texts"
        )
    characters = sorted({character for word in words for character in word})
    alphabet = [*_SPECIAL, *characters, *(f"##{character}" for character in characters)]
    if vocab_size < len(alphabet):
        raise UsageError(
            f"a vocabulary of {vocab_size} cannot hold the {len(alphabet)} single characters of the texts; words would "
            f"become unknown, so ask for more than {len(alphabet)} or pass texts with fewer scripts"
        )
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    # rebuilt, so that the alphabet is ordinary vocabulary again and ids follow the spelling, not a hash map
    learned = sorted(set(tokenizer.get_vocab()) - set(alphabet))
    vocab = {piece: index for index, piece in enumerate([*alphabet, *learned])}
    result = _blank(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100), lowercase)
    result.add_special_tokens(list(_SPECIAL))
    result.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=None,
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    # canonical JSON: the library writes the vocabulary in id order only by grace
    return json.dumps(json.loads(result.to_str()), ensure_ascii=False, indent=1).encode("utf-8")


def read_tokenizer(source: bytes | str | Path) -> bytes:
    """The bytes of a tokenizer.json given as bytes or as a path.

    Raises:
        UsageError: the file does not exist.
    """
    if isinstance(source, bytes):
        return source
    path = Path(source)
    if not path.is_file():
        raise UsageError(
            f"tokenizer file {path.name!r} does not exist; a text tower cannot be built without its vocabulary, so "
            "train one with students.train_tokenizer or give the path of a tokenizer.json"
        )
    return path.read_bytes()


def text_spec(config: TextConfig, tokenizer_json: bytes) -> TextSpec:
    """The text contract of a tower over this tokenizer.

    Raises:
        UsageError: not a tokenizer.json, an unsupported family, or no padding token.
    """
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        description = json.loads(tokenizer_json)
    except Exception as error:  # the Rust side raises bare Exception
        raise UsageError(f"the tokenizer given is not a tokenizer.json of the tokenizers library ({error})") from error
    kind = description["model"].get("type") or type(tokenizer.model).__name__
    if kind not in _FAMILIES:
        raise UsageError(f"tokenizer model {kind!r} is not supported on devices; use WordPiece, BPE or Unigram")
    pad = _pad_id(tokenizer, description)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return TextSpec(
        context_length=config.context_length,
        vocab_size=max(vocab.values()) + 1,
        pad_id=pad,
        family=cast(Literal["wordpiece", "bpe", "unigram"], _FAMILIES[kind]),
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
    )


def _pad_id(tokenizer: Tokenizer, description: dict[str, Any]) -> int:
    if description.get("padding"):
        return int(description["padding"]["pad_id"])
    for token in ("[PAD]", "<pad>", "<|pad|>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    raise UsageError(
        "the tokenizer has no padding token ([PAD], <pad> or a padding section); real tokens would be masked as "
        "padding, so add one to its vocabulary"
    )


def _blank(model: Any, lowercase: bool) -> Any:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=lowercase, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
