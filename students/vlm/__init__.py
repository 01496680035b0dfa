"""Generative students: a picture as tokens before a small decoder that answers in words.

    from pocketvlm.students.vlm import build_vlm, load_vlm, save_vlm, train_vlm_tokenizer

`load_vlm_config` gives a named size (docs/vlm.md lists them), `on_student_tower` puts the tower of a distilled CLIP
student into it, `build_vlm` makes a new model, `save_vlm` and `load_vlm` keep it on disk with hashes.
"""

from __future__ import annotations

from pocketvlm.students.vlm.config import VlmConfig, load_vlm_config, vlm_names
from pocketvlm.students.vlm.io import load_vlm, save_vlm
from pocketvlm.students.vlm.model import Rows, Vlm, build_vlm
from pocketvlm.students.vlm.tokenizer import VlmTokenizer, train_vlm_tokenizer
from pocketvlm.students.vlm.tower import on_student_tower

__all__ = [
    "Rows",
    "Vlm",
    "VlmConfig",
    "VlmTokenizer",
    "build_vlm",
    "load_vlm",
    "load_vlm_config",
    "on_student_tower",
    "save_vlm",
    "train_vlm_tokenizer",
    "vlm_names",
]
