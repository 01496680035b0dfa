"""`EdgeModel.classify` held to the recorded logit scale: right embeddings do not make its own arithmetic right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pocketvlm.edge.model import EdgeModel
from pocketvlm.export.budgets import Check
from pocketvlm.export.reference_run import ReferenceRun

# |probability of `EdgeModel.classify` - softmax of the recorded scale times its own cosines|: float32 rounding of a
# cosine times a scale of 100 is 1e-5; a scale or a softmax that is wrong is off by a tenth
PROBABILITY = 1e-4
_CLASSIFIED, _LABELS = 4, 8


def check_classification(model: EdgeModel, reference: ReferenceRun, images: list[Any], texts: list[Any]) -> Check:
    """`classify` against a softmax of the *recorded* scale times this variant's own cosines: the arithmetic alone."""
    pictures = [reference.image_bytes(record) for record in images[:_CLASSIFIED]]
    labels = list(dict.fromkeys(str(record.text) for record in texts))[:_LABELS]
    rows, columns = (x.astype(np.float64) for x in (model.embed_image(pictures), model.embed_text(labels)))
    cosine = rows @ columns.T / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(columns, axis=1)
    scale = reference.contract.logit_scale
    expected = np.exp(scale * (cosine - cosine.max(axis=1, keepdims=True)))
    expected /= expected.sum(axis=1, keepdims=True)
    found = [[verdict.scores[label] for label in labels] for verdict in model.classify(pictures, labels)]
    gap = float(np.abs(np.array(found) - expected).max())
    return Check(
        "probability", "classify", gap if math.isfinite(gap) else None, PROBABILITY, "lower",
        "pass" if gap <= PROBABILITY else "fail", "float32 rounding of a cosine times a scale of 100",
    )  # fmt: skip
