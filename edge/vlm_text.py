"""Text of a model that answers in words: prompts to ids by the template, ids to text while they come."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import tokenizers

from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError
from pocketvlm.edge.vlm_bundle import VlmContract

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class VlmText:
    """The tokenizer and the template of a bundle.

    Raises:
        IntegrityError: the tokenizer is not the contract's, or its ids do not fit the vocabulary.
    """

    def __init__(self, path: Path, contract: VlmContract) -> None:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest != contract.tokenizer_sha256:
            raise IntegrityError(
                f"{path.name} has sha256 {digest[:16]}… and the model was built with "
                f"{contract.tokenizer_sha256[:16]}…; ids would mean other words, so export the bundle again"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the Rust side raises bare Exception
            raise IntegrityError(
                f"{path.name} is no tokenizer ({error}); no prompt could be read, so export the bundle again"
            ) from error
        if self._tokenizer.get_vocab_size() != contract.vocab_size:
            raise IntegrityError(
                f"{path.name} has {self._tokenizer.get_vocab_size()} ids and the decoder {contract.vocab_size}; ids "
                "would mean other words, so export the bundle again"
            )
        self._contract = contract
        self._bytes = {number for piece, number in self._tokenizer.get_vocab().items() if _BYTE.fullmatch(piece)}

    def prompt_ids(self, prompt: str, *, need_marker: bool = False) -> list[int]:
        """`<USER>` prompt `<ASSISTANT>` as ids.

        Args:
            need_marker: refuse a prompt that does not hold the picture's marker.

        Raises:
            UsageError: no text, the marker more than once or (if asked for) missing, an unpaired surrogate, or more
                ids than the cache holds.
        """
        template, contract = self._contract.template, self._contract
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt is a {type(prompt).__name__}; nothing can be asked by it, so give a string")
        count = prompt.count(template.marker)
        if count > 1:
            raise UsageError(
                f"the prompt holds {template.marker} {count} times but one picture is given; write it once or not at "
                "all"
            )
        if need_marker and not count:
            raise UsageError(
                f"the prompt does not hold {template.marker}, which was demanded; the picture would stand where the "
                "caller does not expect it, so write it once or do not demand it"
            )
        text = prompt.replace(template.marker, " ").strip()
        if not text:
            raise UsageError("the prompt asks nothing, so there is nothing to answer; write a question")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSampleError(
                f"the prompt is no Unicode text ({error.reason} at {error.start}); it has no ids, so read it as UTF-8",
                reason="not-unicode",
            ) from error
        ids = [template.user, *self._tokenizer.encode(text, add_special_tokens=False).ids, template.assistant]
        if len(ids) > contract.longest_prompt:
            raise UsageError(
                f"the prompt has {len(ids)} tokens but the cache holds {contract.longest_prompt} beside the picture "
                "and one token of the answer; shorten it, or export a model with a larger decoder.context_length"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ones are left out, bytes that are no UTF-8 become replacement characters."""
        return self._tokenizer.decode(
            [i for i in ids if i >= self._contract.template.first_text], skip_special_tokens=False
        )


class Pieces:
    """Text of ids that come one after the other; the pieces, joined, are `VlmText.decode` of all."""

    def __init__(self, text: VlmText) -> None:
        self._text, self._ids, self._sent = text, list[int](), 0

    def add(self, token: int) -> str:
        """What can be said now. A letter spelled in bytes is held back until something else follows: a run of bytes is
        read as a whole, and a later one may spoil those before it."""
        self._ids.append(token)
        return "" if token in self._text._bytes else self.rest()

    def rest(self) -> str:
        """All that was held back."""
        whole = self._text.decode(self._ids)
        piece, self._sent = whole[self._sent :], len(whole)
        return piece
