"""How a question and an answer are written for a Hugging Face model, and which tokens the answer becomes.

The wording is the model's own chat template, or one that the user gives. The answer's tokens are those of the whole
conversation beyond the prompt where the tokenizer cuts there, else those of the rest alone: with "ASSISTANT:" before
" a cat", the space belongs to the answer's first token, as it does where the model writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.vlm.base import completed

QUESTION, ANSWER, IMAGE = "{question}", "{answer}", "<image>"
# families that were trained on a bare question
_BARE = {"paligemma": f"{IMAGE}{QUESTION}{ANSWER}"}
# an answer that no template writes by itself
_PROBE = ("What?", "Zyx wvu.")


class Wording:
    """Prompts of one processor. template: as `load_hf_vlm`; None takes the chat template.

    end: the token that ends an answer.
    """

    def __init__(self, processor: Any, model_type: str, template: str | None, name: str) -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        # the processor of these writes a line end behind the prompt by itself
        self._alone = model_type in _BARE
        # the text that the processor puts a picture's tokens in place of
        self.marker: str = getattr(processor, "boi_token", None) or processor.image_token
        chat = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        self.template = template or _BARE.get(model_type)
        if self.template is None and not chat:
            raise UsageError(
                f"{name!r} comes without a chat template, so its prompts would be guesswork and its answers poor; give "
                f"one as template, such as 'USER: {IMAGE}\\n{QUESTION} ASSISTANT: {ANSWER}'"
            )
        if self.template is not None and not _complete(self.template):
            raise UsageError(
                f"the template {self.template!r} must hold {IMAGE}, {QUESTION} and {ANSWER} once each, the answer "
                "behind both; a part would be missing or come too late, so write it like "
                f"'USER: {IMAGE}\\n{QUESTION} ASSISTANT: {ANSWER}'"
            )
        if not getattr(self._tokenizer, "is_fast", False):
            raise UsageError(
                f"{name!r} comes with a slow tokenizer, which does not tell which characters a token stands for; "
                "answers could not be aligned, so use a checkpoint with tokenizer.json"
            )
        _, rest = self._texts(*_PROBE)
        # what the template writes between prompt and answer, in characters
        self._lead = rest.index(_PROBE[1])
        self.end = self._end(name, rest[self._lead + len(_PROBE[1]) :].strip())

    def prompt(self, question: str) -> str:
        """What stands before the answer, the picture as its marker."""
        return self._texts(question, _PROBE[1])[0]

    def answer(self, question: str, answer: str) -> tuple[list[int], tuple[int, ...]]:
        """The answer's tokens and `Scored.ends`, the end of the answer among them.

        Raises:
            UsageError: an answer that is empty, or that the tokenizer makes nothing of.
        """
        if not answer.strip():
            raise UsageError(
                f"the answer to {question[:60]!r} is empty, so there is nothing to read; leave the pair out"
            )
        prompt, rest = self._texts(question, answer)
        start = self._lead if rest.startswith(answer, self._lead) else rest.index(answer)
        stop = start + len(answer)
        tokens = None if self._alone else self._behind(prompt, rest)
        kept = [token for token in tokens or self._tokens(rest) if token[1] < stop]
        if any(end > stop for _, _, end in kept):
            # a token runs into what the template writes behind the answer
            kept, start = self._tokens(answer), 0
        if not kept:
            raise UsageError(f"the tokenizer makes no token of the answer {answer[:60]!r}; leave the pair out")
        places = [(first - start, end - start) for _, first, end in kept]
        return [number for number, _, _ in kept] + [self.end], completed(places, len(answer))

    def special(self, text: str) -> bool:
        """Whether the tokenizer should add its own special tokens: not where the text begins with one already."""
        begin = getattr(self._tokenizer, "bos_token", None)
        return not (begin and text.startswith(begin))

    def _texts(self, question: str, answer: str) -> tuple[str, str]:
        """The prompt, and what a finished conversation adds to it."""
        if self.template is not None:
            before, after = self.template.replace(IMAGE, self.marker).split(ANSWER)
            # a space before the answer is part of its first token
            prompt = before.rstrip(" ").replace(QUESTION, question)
            return prompt, " " * (len(before) - len(before.rstrip(" "))) + answer + after
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        prompt = self._render(asked, True)
        whole = self._render([*asked, said], False)
        if whole.startswith(prompt) and answer in whole[len(prompt) :]:
            return prompt, whole[len(prompt) :]
        return prompt, answer

    def _render(self, messages: Sequence[dict[str, Any]], generate: bool) -> str:
        rendered = self._processor.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)
        return rendered if isinstance(rendered, str) else rendered[0]

    def _behind(self, prompt: str, rest: str) -> list[tuple[int, int, int]] | None:
        """`_tokens` of the rest as they stand behind the prompt, or None where the two have a token in common."""
        whole, before = self._tokens(prompt + rest), self._tokens(prompt)
        if [number for number, _, _ in whole[: len(before)]] != [number for number, _, _ in before]:
            return None
        return [(number, first - len(prompt), end - len(prompt)) for number, first, end in whole[len(before) :]]

    def _tokens(self, text: str) -> list[tuple[int, int, int]]:
        """Tokens of a text, each with its first character and the one behind its last."""
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
        )
        return [(number, first, end) for number, (first, end) in zip(found["input_ids"], found["offset_mapping"])]

    def _end(self, name: str, behind: str) -> int:
        """The first token that the template writes behind an answer, else the tokenizer's end of text."""
        tokens = self._tokens(behind) if behind else []
        if tokens:
            return tokens[0][0]
        end = self._tokenizer.eos_token_id
        if end is None:
            raise UsageError(
                f"{name!r} has neither a token that ends a text nor a template that writes one behind an answer; its "
                "answers would have no end, so give a template that does"
            )
        return int(end)


def _complete(template: str) -> bool:
    if [template.count(part) for part in (IMAGE, QUESTION, ANSWER)] != [1, 1, 1]:
        return False
    return max(template.index(IMAGE), template.index(QUESTION)) < template.index(ANSWER)
