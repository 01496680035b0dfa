"""A generative student small enough to export in a second, with weights large enough that words and places matter."""

from __future__ import annotations

import numpy as np
import torch

from pocketvlm.students.vlm import Vlm, build_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import VlmConfig

# scenes are made at multiples of 6, patches are 16
SIZE = 48
TEXTS = ["What is this?", "a small naïve dolphin", "Wo ist die Büroklammer?", "top left: bus; top right: taxi"]
TOKENIZER = train_vlm_tokenizer(TEXTS, 500, words=["dolphin", "bus", "taxi", "what", "is"])


def toy_vlm(*, seed: int = 2, width: int = 32, context_length: int = 48, layers: int = 2) -> Vlm:
    config = {
        "name": "toy",
        "vision": {
            "backbone": "vit_tiny_patch16_224",
            "size": SIZE,
            "backbone_args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
        },
        "connector_hidden": 16,
        "decoder": {
            "width": width, "layers": layers, "heads": 4, "kv_heads": 2, "hidden": 48, "context_length": context_length,
        },
        "licences": [["words", "MIT", "nobody"]],
    }  # fmt: skip
    model = build_vlm(VlmConfig.model_validate(config), TOKENIZER, seed=seed).eval()
    with torch.no_grad():
        for weight in model.decoder.layers.parameters():
            if weight.ndim == 2:
                weight.mul_(16)
        model.connector.second.weight.mul_(3)
    return model


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
