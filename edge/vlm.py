"""`EdgeVLM`: ask a question about a picture, of a bundle. Needs numpy, Pillow, tokenizers and one runtime; no torch.

from pocketvlm.edge.vlm import EdgeVLM

model = EdgeVLM.load("bundle/")
for piece in model.generate("photo.jpg", "What is at the top left?", stream=True):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.backends import target_of
from pocketvlm.edge.bundle import BundleVariant
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.preprocess import ImageSource, load_image
from pocketvlm.edge.vlm_backends import Decoding, VlmBackend, open_vlm_backend, pick_target
from pocketvlm.edge.vlm_bundle import VlmBundle, VlmContract
from pocketvlm.edge.vlm_text import Pieces, VlmText

BackendName = Literal["auto", "onnxruntime", "executorch"]


@dataclass(frozen=True)
class Answer:
    """What was said about one picture.

    text: the answer. ids: its tokens, the end token left out. ended: the model ended it; False where `max_new_tokens`
    or the cache did. first_token_ms: from the call to the first token, decoding and resizing the picture included.
    tokens_per_second: of the tokens after the first, the end token among them; None where there is none.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool
    first_token_ms: float
    tokens_per_second: float | None


class AnswerStream(Iterator[str]):
    """Pieces of an answer while it is written; joined they are `answer.text`, and none is empty.

    answer: None until the last piece was taken.
    """

    def __init__(self, pieces: Iterator[str | Answer]) -> None:
        self._pieces = pieces
        self.answer: Answer | None = None

    def __next__(self) -> str:
        for found in self._pieces:
            if isinstance(found, Answer):
                self.answer = found
            else:
                return found
        raise StopIteration


class EdgeVLM:
    """Answers questions about pictures. Make one with `EdgeVLM.load`; safe to share among threads, and answers that
    are streamed at the same time do not disturb each other.

    contract: what the model expects and promises. bundle: where it came from. variant: which files run.
    backend: the runtime that runs them. text: tokenizer and template.
    """

    def __init__(self, bundle: VlmBundle, variant: BundleVariant, backend: VlmBackend) -> None:
        self.bundle = bundle
        self.contract: VlmContract = bundle.contract
        self.variant = variant
        self.backend = backend
        self.text = VlmText(bundle.path(bundle.contract.tokenizer), bundle.contract)

    def __repr__(self) -> str:
        return f"EdgeVLM({self.contract.name}, {self.backend.name} {self.variant.precision})"

    @property
    def parity(self) -> dict[str, Any] | None:
        """What 'pocketvlm vlm parity --into-bundle' found about these files: status, message, numbers, what they were
        held to, date; None where nobody wrote it."""
        key = self.variant.target, self.variant.precision
        return next((row for row in self.bundle.parity if (row.get("target"), row.get("precision")) == key), None)

    @classmethod
    def load(
        cls,
        bundle: str | Path | VlmBundle,
        backend: BackendName = "auto",
        precision: str = "auto",
        threads: int | None = None,
        *,
        verify: bool = True,
    ) -> EdgeVLM:
        """Open a bundle folder or zip with one runtime.

        Args:
            bundle: what `pocketvlm vlm export` wrote, or an opened `VlmBundle`.
            backend: "auto" takes the first that the bundle has files for and this machine can run: onnxruntime,
                executorch.
            precision: "fp32", "int8", "w4"; "auto" takes the most faithful that there is.
            threads: for one call of the runtime; None means up to 4.
            verify: check every file's hash first.

        Raises:
            UsageError, UnknownNameError, VersionError, IntegrityError: see `VlmBundle.load`, `VlmBundle.variant` and
                `open_vlm_backend`; the tokenizer is not the model's.
            MissingExtraError: the runtime that was asked for is not installed.
        """
        opened = bundle if isinstance(bundle, VlmBundle) else VlmBundle.load(bundle, verify=verify)
        target = pick_target(opened) if backend == "auto" else target_of(backend)
        variant = opened.variant(target, precision)
        return cls(opened, variant, open_vlm_backend(opened, variant, threads))

    @overload
    def generate(
        self,
        image: ImageSource,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        stream: Literal[False] = ...,
        need_marker: bool = ...,
    ) -> Answer: ...
    @overload
    def generate(
        self,
        image: ImageSource,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        stream: Literal[True],
        need_marker: bool = ...,
    ) -> AnswerStream: ...
    def generate(
        self,
        image: ImageSource,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        stream: bool = False,
        need_marker: bool = False,
    ) -> Answer | AnswerStream:
        """The greedy answer to a question about a picture.

        Args:
            image: a path, encoded bytes, a PIL image or a uint8 array [H, W], [H, W, 3] or [H, W, 4]. What is not
                square is scaled to fit and centred on white (`contract.image`).
            prompt: the question; the marker `<image>` may stand in it once.
            max_new_tokens: tokens to write at most, the end token among them; the cache may hold fewer.
            stream: give pieces of text as they are written (`AnswerStream`) instead of an `Answer`. The prompt and the
                picture are checked before this returns.
            need_marker: refuse a prompt without the marker, for prompts that are made for several pictures.

        Raises:
            UsageError: see `VlmText.prompt_ids` and `edge.preprocess.load_image`; max_new_tokens below 1.
            BadSampleError: see `edge.preprocess.load_image`. IntegrityError: the graph gives NaN or infinity.
        """
        began = time.perf_counter()
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, which leaves no answer; give 1 or more")
        ids = self.text.prompt_ids(prompt, need_marker=need_marker)
        pixels = load_image(image, self.contract.image)
        written = self._write(pixels, ids, max_new_tokens, time.perf_counter() - began)
        if stream:
            return AnswerStream(written)
        *_, answer = written
        assert isinstance(answer, Answer), "an answer ends with its summary"
        return answer

    def prefill(self, pixels: NDArray[np.uint8], ids: list[int]) -> tuple[Decoding, NDArray[np.float32]]:
        """A cache that holds picture and prompt, and the logits [V] of the first token; for parity and for decoding of
        another kind.

        Args:
            pixels: uint8 [S, S, 3]. ids: of `VlmText.prompt_ids`.
        """
        decoding = self.backend.begin()
        return decoding, decoding.prefill(self.backend.picture(pixels[None]), ids)

    def _write(
        self, pixels: NDArray[np.uint8], ids: list[int], max_new_tokens: int, prepared: float
    ) -> Iterator[str | Answer]:
        began = time.perf_counter() - prepared
        end, said, pieces = self.contract.template.end, list[int](), Pieces(self.text)
        decoding, logits = self.prefill(pixels, ids)
        place = self.contract.prefix + len(ids)
        room = min(max_new_tokens, self.contract.context_length - place)
        ended, first, spent, steps = False, 0.0, 0.0, 0
        while True:
            since = time.perf_counter() if steps else began
            if steps:
                logits = decoding.decode(said[-1], place + steps - 1)
            token = int(logits.argmax())
            if not np.isfinite(logits[token]):
                raise IntegrityError(
                    f"the {self.backend.name} {self.variant.precision} graph gave NaN or infinity; no word of it can "
                    "be trusted, so use another precision and check the bundle with 'pocketvlm vlm parity'"
                )
            taken = time.perf_counter() - since
            first, spent = (first, spent + taken) if steps else (taken, 0.0)
            steps += 1
            ended = token == end
            if ended:
                break
            said.append(token)
            if piece := pieces.add(token):
                yield piece
            if steps >= room:
                break
        if piece := pieces.rest():
            yield piece
        speed = (steps - 1) / spent if steps > 1 else None
        yield Answer(self.text.decode(said), tuple(said), ended, first * 1e3, speed)
