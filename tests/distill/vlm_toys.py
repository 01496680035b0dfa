"""A made-up set of pictures, a tokenizer for it and tiny generative models, for tests of their distillation."""

from __future__ import annotations

import numpy as np
import torch

from pocketvlm.data.scene_questions import ask_about
from pocketvlm.data.scenes import LANGUAGES, Picture, PictureSet
from pocketvlm.distill.vlm.scene_list import SceneList
from pocketvlm.students.vlm import Vlm, build_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import VlmConfig

SIDE = 48
_INK = {"red": (210, 47, 39), "blue": (30, 80, 160), "green": (92, 158, 49), "yellow": (252, 234, 43)}
_KINDS = ("animal", "vehicle", "tool", "plant")


def made_pictures(count: int = 16) -> PictureSet:
    """Filled squares, whose colour is their kind's too."""
    pictures, pixels = [], []
    for number in range(count):
        colour = list(_INK)[number % 4]
        drawn = np.full((24, 24, 3), 255, np.uint8)
        drawn[2 + number % 3 : 22, 2 : 20 + number % 3] = _INK[colour]
        name = f"thing {chr(97 + number)}"
        pictures.append(Picture(f"made/{number}", dict.fromkeys(LANGUAGES, name), _KINDS[number % 4], colour, name))
        pixels.append(drawn)
    return PictureSet(pictures, pixels)


PICTURES = made_pictures()
_TEXTS = [text for i in range(200) for q in ask_about(PICTURES, 0, i, 8)[1] for text in (q.text, q.answer)]
TOKENIZER = train_vlm_tokenizer(_TEXTS, 700)
OTHER_TOKENIZER = train_vlm_tokenizer([*_TEXTS, "zebra zoo"], 700)


def tiny(seed: int = 0, *, width: int = 48, tokenizer: bytes = TOKENIZER) -> Vlm:
    """In eval mode."""
    config = VlmConfig.model_validate(
        {
            "name": f"tiny-{width}",
            "vision": {"backbone": "test_efficientnet", "size": SIDE, "levels": [3]},
            "connector_hidden": 48,
            "decoder": {"width": width, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 96, "context_length": 160},
        }
    )
    return build_vlm(config, tokenizer, seed=seed).eval()


def made_list(scenes: int = 9, *, seed: int = 0, questions: int = 4, variants: int = 2) -> SceneList:
    return SceneList.draw(
        PICTURES, TOKENIZER, scenes=scenes, questions=questions, seed=seed, variants=variants, length=120
    )


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
