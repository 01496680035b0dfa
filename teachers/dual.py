"""What the adapters of upstream dual encoders share: a frozen module, its preprocessing, its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec, TextSpec, identity
from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.base import TeacherOutput
from pocketvlm.teachers.device import full_float32
from pocketvlm.teachers.files import make_fingerprint, tensors_sha256
from pocketvlm.teachers.minilm import check_text

# strings on which a travelling tokenizer.json must agree with the upstream tokenizer before it is handed out
PROBES = (
    "a photo of a cat",
    "It's the dog's bone, isn't it?! (No.)",
    "UPPER lower  double   space",
    "naïve café déjà vu – Zürich",
    "日本語のテキスト、写真",
    "🐱🏽 emoji 👩‍👩‍👧",
    "1,234.56 % of #tags @home",
    "long " * 200,
)


class DualEncoderTeacher:
    """A frozen upstream dual encoder behind the `Teacher` protocol.

    model: the untouched upstream module (what `pocketvlm export --from` exports), in eval mode, without gradients.
    text: context length, vocabulary and tokenizer hash, or None where no tokenizer.json can represent it.
    tokenize: strings to the upstream ids, int64 [N, L].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        image: ImageSpec,
        dim: int,
        logit_scale: float,
        logit_bias: float,
        licences: tuple[tuple[str, str, str], ...],
        device: torch.device,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.name = name
        self.image = image
        self.dim = dim
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.licences = licences
        self.device = device
        self._mean = torch.tensor(image.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(image.std, device=device).view(1, 3, 1, 1)
        self._text: tuple[bytes, TextSpec] | None = None
        self.fingerprint = make_fingerprint(
            weights=tensors_sha256(model.state_dict()),
            image=image,
            # the ids of the probes identify the tokenizer, whatever files it came from
            tokenizer=tensors_sha256({"ids": self.tokenize(PROBES)}),
        )
        self.space_id = identity(name.split(":")[0], self.fingerprint)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, L] upstream ids."""
        raise NotImplementedError(f"{type(self).__name__} must define tokenize")

    def _image_outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(f"{type(self).__name__} must define _image_outputs")

    def _text_outputs(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError(f"{type(self).__name__} must define _text_outputs")

    def _build_text(self) -> tuple[bytes, TextSpec]:
        raise NotImplementedError(f"{type(self).__name__} must define _build_text")

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        """pixels: uint8 [B, S, S, 3], made by `edge.preprocess` under `self.image`.

        Raises:
            UsageError: another shape or dtype.
        """
        with full_float32():
            return _output(*self._image_outputs(self._normalised(pixels)))

    @torch.no_grad()
    def encode_image_tokens(self, pixels: Tensor) -> TeacherOutput:
        """As `encode_images`, and taps["tokens"] [B, N, W]: the last layer's patch tokens, or its map's places.

        Raises:
            UsageError: another shape or dtype, or a tower that gives no square grid of patch tokens.
        """
        with full_float32():
            embedding, features, tokens = self._image_tokens(self._normalised(pixels))
        if tokens is None or tokens.ndim != 3 or math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
            found = "none" if tokens is None else f"{list(tokens.shape)}"
            raise UsageError(
                f"objectives on token maps were asked of {self.name}, whose image tower gives no square grid of patch "
                f"tokens (found {found}), so there is no map to learn from; use a ViT teacher, or leave them out"
            )
        output = _output(embedding, features)
        return TeacherOutput(output.embedding, output.features, {"tokens": tokens.float()})

    def _image_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (*self._image_outputs(pixels), None)

    def _normalised(self, pixels: Tensor) -> Tensor:
        expected = (self.image.size, self.image.size, 3)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != expected:
            raise UsageError(
                f"pixels {tuple(pixels.shape)} {pixels.dtype} were given to {self.name}, which takes uint8 "
                f"[B, {expected[0]}, {expected[1]}, 3]; prepare them with load_image(source, teacher.image)"
            )
        x = pixels.to(self.device).permute(0, 3, 1, 2).float() / 255
        return (x - self._mean) / self._std

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        """Strings to embeddings; texts past the context are cut as upstream cuts them.

        Raises:
            BadSampleError: a text is empty or not a string.
        """
        for text in texts:
            check_text(text)
        with full_float32():
            return _output(*self._text_outputs(texts))

    @property
    def text(self) -> TextSpec:
        """The contract's text half. Raises UsageError where `tokenizer_json` does."""
        return self._travelling()[1]

    def tokenizer_json(self) -> bytes:
        """The tokenizer as `tokenizer.json` bytes, checked against upstream's ids on a set of probe strings.

        Raises:
            UsageError: no tokenizer.json gives this model's ids.
        """
        return self._travelling()[0]

    def _travelling(self) -> tuple[bytes, TextSpec]:
        if self._text is None:
            data, spec = self._build_text()
            refuse_other_ids(data, spec, self.tokenize, self.name)
            self._text = data, spec
        return self._text


def refuse_other_ids(data: bytes, spec: TextSpec, tokenize: Callable[[Sequence[str]], Tensor], name: str) -> None:
    """Compare a tokenizer.json with the upstream tokenizer on `PROBES`.

    Raises:
        UsageError: the ids differ; the message shows the first string.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.decode())
    tokenizer.enable_truncation(spec.context_length)
    tokenizer.enable_padding(length=spec.context_length, pad_id=spec.pad_id)
    for probe, theirs in zip(PROBES, tokenize(PROBES).tolist()):
        if tokenizer.encode(probe).ids != theirs:
            raise UsageError(
                f"the tokenizer of {name} cannot be written as tokenizer.json: the ids of {probe[:40]!r} differ, so a "
                "bundle would embed other texts than the model; export the image tower with baked-in labels instead"
            )


def without(module: nn.Module, parameter: str) -> nn.Module:
    """A view of `module` that shares everything but has no `parameter` (None), and leaves `module` as it is.

    open_clip's towers skip their projection when it is None; this gives the pooled features before it.
    """
    twin = nn.Module.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters, parameter: None}
    return twin


def _output(embedding: Tensor, features: Tensor | None) -> TeacherOutput:
    return TeacherOutput(F.normalize(embedding.float(), dim=-1), None if features is None else features.float())
