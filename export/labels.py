"""A dual encoder and a list of labels become one graph of the image tower: logits out, no text tower on the device.

What `EdgeModel.classify` computes with both towers is a linear layer on the picture's embedding as soon as the labels
are known: logits = scale * embedding @ labels.T + bias. That layer is made in float64 and ships inside the graph.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pocketvlm.edge.contract import identity
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.export.conformance import double_rows
from pocketvlm.export.source import Exportable
from pocketvlm.export.targets.base import Towers

BARE = ("{}",)


class LabelledImage(nn.Module):
    """uint8 [B, S, S, 3] -> logits [B, K]: an image tower that ends in unit-length [B, D], and one linear layer."""

    def __init__(self, tower: nn.Module, labels: Tensor, scale: float, bias: float) -> None:
        """labels: float64 [K, D], of unit length. scale: the multiplier of cosines itself, not its logarithm."""
        super().__init__()
        self.tower = tower
        self.labels = nn.Linear(labels.shape[1], labels.shape[0])
        self.labels.weight = nn.Parameter((scale * labels).float())
        self.labels.bias = nn.Parameter(torch.full((len(labels),), bias))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.labels(self.tower(pixels))


def bake_labels(model: Exportable, labels: Sequence[str], templates: str | Sequence[str] = BARE) -> Exportable:
    """The classifier of `model` over `labels`: its image tower and the logits that `EdgeModel.classify` would softmax.

    labels: at least two, all different, in the order of the logits. templates: prompts with "{}" where the label goes;
    a label's embedding is the normalised mean of its prompts' normalised embeddings, as in zero-shot evaluation.

    Returns:
        An `Exportable` without text tower and tokenizer; its contract has kind "classifier", the labels, and ids of its
        own, because other labels are another model.

    Raises:
        UsageError: the model lacks a tower; fewer than two labels, a label twice, blank or without any token; a
        template without "{}". IntegrityError: the text tower gives values that are not finite.
    """
    contract, towers = model.towers.contract, model.towers
    tokenizer = model.tokenizer()
    if contract.kind != "dual" or towers.image is None or towers.text is None or tokenizer is None:
        raise UsageError(
            f"labels were given and {contract.name!r} is of kind {contract.kind!r}; their embeddings come from a text "
            "tower, which it does not have, so export a dual encoder with them"
        )
    labels, templates = _checked(labels), (templates,) if isinstance(templates, str) else tuple(templates)
    if not templates or any("{}" not in template for template in templates):
        raise UsageError(
            f"templates {list(templates)} were given and each needs '{{}}' where the label goes; every label would "
            "look the same, so write for instance 'a picture of {}'"
        )
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    try:
        ids = tokenizer.encode(prompts)
    except BadSampleError as error:
        raise UsageError(
            f"a label or a template cannot be encoded ({error}); its logit would mean nothing, so write it otherwise"
        ) from error
    each = double_rows(towers.text, ids).reshape(len(labels), len(templates), -1)
    mean = each.mean(axis=1)
    embeddings = torch.from_numpy(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    head = LabelledImage(towers.image, embeddings, contract.logit_scale, contract.logit_bias)
    made = identity(
        contract.name, hashlib.sha256(json.dumps([contract.model_id, labels, templates]).encode()).hexdigest()
    )
    classifier = replace(
        contract,
        kind="classifier",
        model_id=made,
        space_id=made,
        embed_dim=len(labels),
        dims=(len(labels),),
        text=None,
        logit_scale=1.0,
        logit_bias=0.0,
        normalized=False,
        labels=labels,
    )
    facts: dict[str, object] = {
        "model_id": contract.model_id,
        "space_id": contract.space_id,
        "templates": list(templates),
    }
    facts |= {"logit_scale": contract.logit_scale, "logit_bias": contract.logit_bias}
    return Exportable(
        Towers(head.eval().requires_grad_(False), None, classifier),
        None,
        model.licences,
        model.provenance | {"labels_of": facts},
    )


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Labels of a text file in UTF-8, one a line; blank lines are passed over.

    Raises:
        UsageError: no such file, or it is not UTF-8 text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"labels cannot be read from {str(path)!r} ({reason}); there would be nothing to classify by, so give a "
            "text file with one label a line"
        ) from error
    return tuple(line.strip() for line in lines if line.strip())


def _checked(labels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(labels, str):
        raise UsageError(
            f"labels {labels!r} are one string and a list is expected; its characters would be the classes, so give "
            "[label, label, ...]"
        )
    labels = tuple(labels)
    if len(labels) < 2:
        raise UsageError(
            f"{len(labels)} labels were given and at least two are needed; there would be nothing to tell apart, so "
            "name more"
        )
    if blank := [label for label in labels if not isinstance(label, str) or not label.strip()]:
        raise UsageError(f"label {blank[0]!r} is no text, and its logit would mean nothing; remove it")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UsageError(
            f"labels {twice} were given more than once; they would share their probability, so name each once"
        )
    return labels
