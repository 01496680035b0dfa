"""Record a reference run: what the unpatched eager model answers to golden inputs, and how exact that answer is.

float64 on the CPU, float32 with every shortcut off on CUDA; the same code. The exported, fused and quantised graphs
are later compared with this folder and never with one another.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pocketvlm.data.sample import Sample
from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import BadSampleError, IntegrityError, PocketvlmError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.export import reference_run as layout
from pocketvlm.export.cases import golden_images, golden_texts, pick
from pocketvlm.export.compare import drift, plain
from pocketvlm.export.numerics import (
    NarrowOperators,
    command_line,
    describe_environment,
    reference_device,
    strict_facts,
    strict_numerics,
    tf32,
)
from pocketvlm.export.reference_run import ReferenceRun, load_reference, sha256
from pocketvlm.export.reference_show import show
from pocketvlm.export.reference_write import (
    BATCH,
    PROMPT,
    Rows,
    Writer,
    draft_of,
    encode_rows,
    refuse_full_folder,
    unit_rows,
    write_cases,
    write_taps,
    write_task,
)
from pocketvlm.export.subject import Runner, Subject, open_subject

__all__ = ["ReferenceRun", "load_reference", "record_reference", "show"]

REAL_CASES = 16
# below this many texts "the top ten" is most of the gallery, and its overlap says nothing
MIN_TASK = 20
NOISE_ROWS = 128
# for the checks whose answer is zero or next to it, and for half precision, which a CPU computes very slowly
RERUN_ROWS = 32


class Source(Protocol):
    """What is asked of a data set; `data.DataSource` has it."""

    @property
    def name(self) -> str: ...
    @property
    def samples(self) -> Sequence[Sample]: ...
    @property
    def licences(self) -> Sequence[tuple[str, str, str]]: ...


def record_reference(
    source: Any,
    out: str | Path,
    *,
    data: Source,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    max_task: int = 512,
    seed: int = 0,
    command: str | None = None,
    allow_download: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ReferenceRun:
    """Record golden inputs, outputs, taps, a task and the noise floor of one model into the folder `out`.

    Args:
        source: what `subject.open_subject` takes: a `Student` or a folder that `students.load_student` reads;
            "open_clip:NAME@WEIGHTS" or "hf:FOLDER", recorded by upstream's own forward. Never a deploy copy.
        data: pictures with captions that the model was not trained on (for instance openmoji?pool=test&fold=0).
        device: "cpu" (float64), "cuda" (float32, TF32 off), or "auto".
        max_task: at most this many pictures in the task; chosen by a hash of uid and seed.
        command: recorded as the command that made it; by default the running one, without machine paths.
        allow_download, trust_remote_code: of `teachers.load_teacher`, for somebody else's model.
        progress: called with one line per step.

    Returns:
        The recording, read back from disk and verified.

    Raises:
        UsageError: `out` is not empty and `overwrite` is False, or the data has too few captions.
        IntegrityError: the model's outputs are not finite.
    """
    # resolved, because a path like "." has no name to put a neighbour beside
    out, say = Path(out).resolve(), progress or (lambda line: None)
    refuse_full_folder(out, overwrite)
    where = reference_device(device)
    subject = open_subject(source, allow_download=allow_download, trust_remote_code=trust_remote_code)
    contract = subject.contract
    assert contract.image is not None, "open_subject refuses a single tower"
    assert contract.text is not None, "open_subject refuses a single tower"
    dtype = torch.float64 if where.type == "cpu" else torch.float32
    images = golden_images(data.samples, count=REAL_CASES, seed=seed)
    texts = golden_texts(data.samples, count=REAL_CASES, context_length=contract.text.context_length, seed=seed)
    task = task_inputs(data.samples, subject, max_task, seed)

    with draft_of(out) as part:
        for room in ("cases/images", "taps", "task"):
            (part / room).mkdir(parents=True)
        files = Writer(part)
        pixels, ids = write_cases(files, images, texts, contract.image, subject.ids)
        say(f"answering {len(pixels)} golden pictures and {len(ids)} golden texts")
        with strict_numerics(where):
            strict = strict_facts(where, dtype)
            model = subject.runner(dtype, where)
            outputs = {"image": encode_rows(model, "image", pixels), "text": encode_rows(model, "text", ids)}
            scale, bias = contract.logit_scale, contract.logit_bias
            for tower, raw in outputs.items():
                if not np.isfinite(raw).all():
                    raise IntegrityError(
                        f"the {tower} tower of {contract.name!r} gives NaN or Inf, so nothing can be held to it; "
                        "look for a diverged training before recording"
                    )
            unit = {tower: unit_rows(raw) for tower, raw in outputs.items()}
            files.npz(
                layout.ARRAYS,
                pixels=pixels,
                ids=ids,
                image_raw=outputs["image"],
                text_raw=outputs["text"],
                image=unit["image"],
                text=unit["text"],
                logits=scale * unit["image"] @ unit["text"].T + bias,
            )
            write_taps(files, model, {"image": pixels, "text": ids})
            say(f"answering the task: {len(task['uids'])} pictures, {len(task['texts'])} texts")
            embedded = {
                "image": encode_rows(model, "image", task["pixels"]),
                "text": encode_rows(model, "text", task["ids"]),
                "prompt": encode_rows(model, "text", task["prompt_ids"]) if task["labels"] else _empty(contract),
            }
            write_task(files, task, embedded)
            say("measuring the noise floor: float32, TF32, bfloat16, float16")
            files.json(layout.NOISE, _noise(subject, model, dtype, where, task, embedded))
            narrow = _narrow(model, pixels, ids) if dtype == torch.float64 else []
        files.json(layout.WEIGHTS, subject.weight_facts())
        manifest = {
            "schema_version": layout.SCHEMA_VERSION,
            "model_id": contract.model_id,
            "contract": contract.to_dict(),
            "source": dict(subject.provenance),
            "licences": [list(row) for row in subject.licences],
            "not_compared": dict(subject.not_compared),
            "sha256": {"weights": subject.weights, "tokenizer": sha256(subject.tokenizer_json), **subject.files},
            "numerics": {**strict, "narrower_operators": narrow, "batch_size": BATCH},
            "environment": describe_environment(where),
            "seeds": {"cases": seed, "task": seed},
            "command": command or command_line(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "data": {"name": data.name, "samples": len(data.samples), "licences": [list(row) for row in data.licences]},
            "counts": {
                "images": len(images),
                "texts": len(texts),
                "task_pictures": len(task["uids"]),
                "task_texts": len(task["texts"]),
                "classes": len(task["labels"]),
            },
            "files": files.listing,
        }
        (part / layout.MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        load_reference(part)
    return load_reference(out)


# --- inputs -------------------------------------------------------------------------------------------------------


def _caption(sample: Sample) -> str | None:
    for caption in sorted(sample.captions, key=lambda caption: not caption.language.startswith("en")):
        if isinstance(caption.text, str) and caption.text.strip():
            return caption.text
    return None


def task_inputs(samples: Sequence[Sample], subject: Subject, limit: int, seed: int) -> dict[str, Any]:
    """Pictures with a caption and the gallery of their distinct captions; classes where pictures carry labels."""
    spec = subject.contract.image
    assert spec is not None, "open_subject refuses a single tower"
    chosen: list[Sample] = []
    pixels: list[NDArray[np.uint8]] = []
    for sample in pick([s for s in samples if _caption(s)], len(samples), seed):
        if len(chosen) == limit:
            break
        try:
            pixels.append(load_image(sample.image.read(), spec))
            subject.ids([_caption(sample) or ""])
        except BadSampleError:
            del pixels[len(chosen) :]
            continue
        chosen.append(sample)
    texts = sorted({_caption(sample) or "" for sample in chosen})
    if len(texts) < MIN_TASK:
        raise UsageError(
            f"the data gives {len(texts)} distinct captions with readable pictures and the reference task needs "
            f"{MIN_TASK}; a smaller gallery would call every ranking equal, so use more data or a larger --max-task"
        )
    column = {text: index for index, text in enumerate(texts)}
    labelled = all(sample.label for sample in chosen)
    labels = sorted({sample.label or "" for sample in chosen}) if labelled else []
    prompts = [PROMPT.format(label) for label in labels]
    return {
        "uids": [sample.uid for sample in chosen],
        "texts": texts,
        "positives": [sorted({column[c.text] for c in s.captions if c.text in column}) for s in chosen],
        "pixels": np.stack(pixels),
        "ids": subject.ids(texts),
        "labels": labels,
        "prompts": prompts,
        "prompt_ids": subject.ids(prompts),
        "label_of": np.array([labels.index(s.label or "") for s in chosen] if labelled else [], dtype=np.int64),
    }


# --- the model ----------------------------------------------------------------------------------------------------


def _empty(contract: ModelContract) -> NDArray[np.float64]:
    return np.zeros((0, contract.embed_dim))


def _narrow(model: Runner, pixels: Rows, ids: Rows) -> list[str]:
    """Operators of a float64 model that answer in less: what upstream itself rounds, the recording has rounded too."""
    with NarrowOperators() as seen:
        for tower, rows in (("image", pixels), ("text", ids)):
            model.encode(tower, torch.from_numpy(rows[:1]))
    return sorted(seen.found)


def _noise(
    subject: Subject,
    model: Runner,
    dtype: torch.dtype,
    device: torch.device,
    task: dict[str, Any],
    embedded: dict[str, NDArray[np.float64]],
) -> dict[str, Any]:
    """The reference against itself under other arithmetic, on the task's inputs (real data, the same precision).

    Each entry: drift per tower and the deviation of the similarity matrix. "float32" compares float32 with float64
    over every row, "tf32" uses the first `NOISE_ROWS` and says whether hardware or emulation "made" it, the others use
    the first `RERUN_ROWS`.
    """
    inputs = {"image": task["pixels"], "text": task["ids"]}
    cpu = torch.device("cpu")

    def against(other: Callable[[str, Rows], NDArray[np.float64]], rows: int, base: dict[str, Rows]) -> dict[str, Any]:
        reference = {tower: unit_rows(base[tower][:rows]) for tower in inputs}
        candidate = {tower: unit_rows(other(tower, inputs[tower][:rows])) for tower in inputs}
        result: dict[str, Any] = {t: drift(reference[t], candidate[t]).to_dict() for t in inputs}
        deviation = candidate["image"] @ candidate["text"].T - reference["image"] @ reference["text"].T
        result["scores"] = {
            "score_max_abs": plain(np.abs(deviation).max()),
            "score_rms": plain(np.sqrt(np.mean(np.square(deviation)))),
        }
        result["rows"] = {tower: len(reference[tower]) for tower in inputs}
        return result

    everything = len(task["uids"])
    if dtype == torch.float64:
        single, exact = subject.runner(torch.float32, device), embedded
        ordinary = {tower: encode_rows(single, tower, inputs[tower][:everything]) for tower in inputs}
    else:
        single, ordinary = model, {tower: embedded[tower] for tower in inputs}
        wide = subject.runner(torch.float64, cpu)
        exact = {tower: encode_rows(wide, tower, inputs[tower][:everything]) for tower in inputs}

    noise = {
        "rerun": against(lambda t, x: encode_rows(model, t, x), RERUN_ROWS, embedded),
        "float32": against(lambda t, x: ordinary[t][: len(x)], everything, exact),
        "batch": against(lambda t, x: encode_rows(single, t, x, batch=1), RERUN_ROWS, ordinary),
    }
    made, inside = tf32(device)
    noise["tf32"] = against(lambda t, x: encode_rows(single, t, x, inside=inside), NOISE_ROWS, ordinary)
    noise["tf32"]["made"] = made
    for name, half in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        try:
            narrow = subject.runner(half, device)
            noise[name] = against(lambda t, x, m=narrow: encode_rows(m, t, x), RERUN_ROWS, exact)  # type: ignore[misc]
        except (RuntimeError, PocketvlmError) as error:
            # an operator without a half-precision kernel here, or an overflow: no floor, so budgets stay as they are
            noise[name] = {"unavailable": str(error).splitlines()[0]}
    return noise
