"""Strings to the int32 ids that a text graph takes: `tokenizer.json` under the contract's `TextSpec`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError


class Tokenizer:
    """A `tokenizer.json` that pads on the right and cuts at the context as the contract says. Thread-safe.

    Args:
        tokenizer_json: the file's path, its bytes, or its text (a str that starts with "{").
        spec: context length, vocabulary size, padding id and, where given, the file's sha256.

    Raises:
        UsageError: the file does not exist.
        IntegrityError: its hash differs from the spec's, it is no tokenizer, or its ids do not fit the
            vocabulary that the graph was built for.
    """

    def __init__(self, tokenizer_json: Path | str | bytes, spec: TextSpec) -> None:
        data = _read(tokenizer_json)
        digest = hashlib.sha256(data).hexdigest()
        if spec.tokenizer_sha256 and digest != spec.tokenizer_sha256:
            raise IntegrityError(
                f"the tokenizer file has sha256 {digest[:16]}… and the model was built with "
                f"{spec.tokenizer_sha256[:16]}…; its ids would mean other words, so use the file from the bundle"
            )
        self.spec = spec
        self._text = data.decode("utf-8", errors="replace")
        self._padded = self._build()
        self._check_vocabulary()
        self._padded.enable_truncation(max_length=spec.context_length)
        self._padded.enable_padding(
            direction="right", pad_id=spec.pad_id, pad_token=self._pad_token(), length=spec.context_length
        )

    def encode(self, texts: str | Sequence[str]) -> NDArray[np.int32]:
        """Token ids, padded with `pad_id` and cut so that a closing special token is kept.

        Args:
            texts: strings; a single string counts as a list of one.

        Returns:
            int32 [len(texts), context_length].

        Raises:
            BadSampleError: reason "not-a-string", "not-unicode" (an unpaired surrogate), "empty-text" (nothing
                but white space, or no token at all) or "unencodable-text" (the tokenizer itself fails on it).
        """
        texts = _check_texts(texts)
        if not texts:
            return np.zeros((0, self.spec.context_length), np.int32)
        ids = np.array(_ids(self._padded, texts), np.int32)
        empty = (ids == self.spec.pad_id).all(axis=1)
        if empty.any():
            raise _empty(texts[int(np.argmax(empty))])
        return ids

    def lengths(self, texts: str | Sequence[str]) -> list[int]:
        """Number of tokens of each text before cutting, special tokens included; more than `context_length` is cut.

        Raises:
            BadSampleError: as `encode`, but for a text without any token, whose length is then 0.
        """
        return [len(ids) for ids in _ids(self._plain, _check_texts(texts))]

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return self._build()

    def _build(self) -> tokenizers.Tokenizer:
        try:
            built = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # the library raises bare Exception
            raise IntegrityError(
                f"the tokenizer file cannot be parsed ({error}); no text could be encoded, "
                "so supply the tokenizer.json that the model was trained with"
            ) from error
        # a file may carry its own padding and truncation; the contract alone decides both
        built.no_padding()
        built.no_truncation()
        return built

    def _check_vocabulary(self) -> None:
        spec = self.spec
        largest = max(self._padded.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= spec.vocab_size or not 0 <= spec.pad_id < spec.vocab_size:
            raise IntegrityError(
                f"the tokenizer's largest id is {largest} and pad_id is {spec.pad_id}, but the model's vocabulary "
                f"holds {spec.vocab_size} ids; the graph would read outside its table, so use the matching tokenizer"
            )
        special = self._padded.num_special_tokens_to_add(is_pair=False)
        if spec.context_length <= special:
            raise UsageError(
                f"a context of {spec.context_length} tokens has no room beside {special} special tokens; "
                f"use at least {special + 1}"
            )

    def _pad_token(self) -> str:
        return self._padded.id_to_token(self.spec.pad_id) or "[PAD]"


def _read(source: Path | str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return source.encode()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise UsageError(
            f"tokenizer file {str(source)!r} cannot be read ({error.strerror}); no text could be encoded, "
            "so give the path of a tokenizer.json"
        ) from error


def _check_texts(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise BadSampleError(
                f"a text is {text!r} of type {type(text).__name__} and a string is expected; "
                "it has no tokens, so convert or remove it",
                reason="not-a-string",
            )
        if not text.strip():
            raise _empty(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadSampleError(
                f"text {text!r} holds an unpaired surrogate, which is no character; "
                "it has no tokens, so decode its source again",
                reason="not-unicode",
            ) from error
    return texts


def _ids(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    except Exception as error:  # the library raises bare Exception, and does not say for which text
        if len(texts) > 1:
            return [_ids(tokenizer, [text])[0] for text in texts]
        raise BadSampleError(
            f"text {texts[0]!r} cannot be encoded ({error}); it has no ids, so remove it or use another tokenizer",
            reason="unencodable-text",
        ) from error


def _empty(text: str) -> BadSampleError:
    return BadSampleError(
        f"text {text!r} has nothing to encode; its embedding would mean nothing, so remove the sample",
        reason="empty-text",
    )
