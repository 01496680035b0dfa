"""A recording replayed: is it whole, and does its model still answer like that, on this machine?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pocketvlm.edge.errors import BadSampleError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.export.budgets import load_budgets
from pocketvlm.export.compare import drift
from pocketvlm.export.numerics import reference_device, strict_numerics
from pocketvlm.export.reference_diff import ReferenceDiff, changed_values
from pocketvlm.export.reference_run import ReferenceRun
from pocketvlm.export.reference_write import encode_rows, unit_rows
from pocketvlm.export.subject import Subject, open_subject


def replay(
    reference: ReferenceRun,
    source: Any,
    *,
    device: str | torch.device = "auto",
    allow_download: bool = False,
    trust_remote_code: bool = False,
) -> ReferenceDiff:
    """Ask the model again what the recording holds, from encoded pictures and strings on, and compare.

    source: what `record_reference` takes. device: "cpu" (float64), "cuda" (float32, TF32 off) or "auto", whatever the
    recording was made on. Taps are not recorded again.

    Raises:
        UsageError: nothing there that could be asked.
    """
    subject = open_subject(source, allow_download=allow_download, trust_remote_code=trust_remote_code)
    where = reference_device(device)
    dtype = torch.float64 if where.type == "cpu" else torch.float32
    found = ReferenceDiff(limit=load_budgets().for_precision("fp32").metrics["one_minus_cosine_max"].value)
    recorded = reference.manifest["sha256"]
    if subject.weights != recorded["weights"]:
        found.model.append("sha256 of the weights is another than the recording's")
    found.model += [
        f"{key} of the contract is {here!r} here and {there!r} in the recording"
        for key, here, there in changed_values(subject.contract.to_dict(), reference.contract.to_dict())
    ]
    found.inputs += _inputs(reference, subject)
    then = reference.manifest["numerics"]["dtype"], reference.manifest["environment"].get("device_name")
    found.made.append(f"recorded in {then[0]} on {then[1]}, replayed in {str(dtype)[6:]} on {where.type}")
    if subject.contract.embed_dim != reference.contract.embed_dim:
        return found
    task, arrays = reference.task, reference.arrays
    with strict_numerics(where):
        model = subject.runner(dtype, where)
        for tower, inputs, expected in (
            ("image", (arrays["pixels"], task.pixels), (arrays["image"], task.image)),
            ("text", (arrays["ids"], task.ids), (arrays["text"], task.text)),
        ):
            if inputs[0].shape[1:] != _shape(subject, tower):
                found.inputs.append(f"the {tower} tower here takes inputs of another shape, so nothing was asked")
                continue
            rows = [unit_rows(encode_rows(model, tower, part)) for part in inputs]
            found.answers[tower] = drift(np.concatenate(expected), np.concatenate(rows)).to_dict()
    return found


def _inputs(reference: ReferenceRun, subject: Subject) -> list[str]:
    """Cases that this machine decodes, resizes or tokenizes to something else."""
    spec, found = subject.contract.image, []
    assert spec is not None, "open_subject refuses a single tower"
    other = []
    for picture in reference.images:
        if picture.row is not None:
            try:
                pixels = load_image(reference.image_bytes(picture), spec)
                if not np.array_equal(pixels, reference.arrays["pixels"][picture.row]):
                    other.append(picture.name)
            except BadSampleError:
                other.append(picture.name)
    if other:
        found.append(f"{len(other)} pictures have other pixels here, first {other[0]!r}")
    texts = [text for text in reference.texts if text.row is not None]
    ids = subject.ids([text.text for text in texts])
    expected = reference.arrays["ids"]
    other = [t.name for t, row in zip(texts, ids) if not np.array_equal(row, expected[t.row])]
    if other:
        found.append(f"{len(other)} texts have other ids here, first {other[0]!r}")
    return found


def _shape(subject: Subject, tower: str) -> tuple[int, ...]:
    contract = subject.contract
    if tower == "image":
        assert contract.image is not None
        return (contract.image.size, contract.image.size, 3)
    assert contract.text is not None
    return (contract.text.context_length,)
