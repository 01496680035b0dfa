"""Frozen generative teachers: models that answer questions about pictures, and answers that were recorded before.

    teacher = load_hf_vlm("FOLDER")                       LLaVA, Qwen-VL, SmolVLM, PaliGemma and their like
    samples = recorded_answers("answers.jsonl", samples, report)      black box, asked once and written down

White box: `read` shows logits, hidden states and visual tokens of given answers. Black box: `answer` alone. The kit's
own generative models stand behind the same protocol in `distill.vlm.teachers`.
"""

from __future__ import annotations

from pocketvlm.teachers.vlm.base import Scored, VlmTeacher, vocabulary_id
from pocketvlm.teachers.vlm.hf import HfVlm, load_hf_vlm
from pocketvlm.teachers.vlm.recorded import read_answers, recorded_answers

__all__ = ["HfVlm", "Scored", "VlmTeacher", "load_hf_vlm", "read_answers", "recorded_answers", "vocabulary_id"]
