"""A toy world for the parity tests: coloured shapes with captions, a minute student, an ONNX bundle of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.data.source import DataSource
from pocketvlm.edge.bundle import describe_files
from pocketvlm.edge.contract import ModelContract
from pocketvlm.export.targets.onnx import export_graph
from pocketvlm.students import build_student, deploy_image, deploy_text, train_tokenizer

COLORS = {
    "red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "yellow": (230, 220, 30),
    "black": (10, 10, 10), "pink": (250, 120, 180), "brown": (120, 70, 30), "violet": (130, 40, 200),
}  # fmt: skip
SHAPES = ("circle", "square", "bar", "ring", "cross")


def toy_data(count: int = 40) -> DataSource:
    samples = []
    for index in range(count):
        color, shape = list(COLORS)[index % 8], SHAPES[index // 8 % 5]
        image = Image.new("RGB", (48, 40), (240, 240, 235))
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse([8, 6, 36, 34], fill=COLORS[color])
        elif shape == "square":
            draw.rectangle([8, 6, 36, 34], fill=COLORS[color])
        elif shape == "bar":
            draw.rectangle([4, 16, 44, 24], fill=COLORS[color])
        elif shape == "ring":
            draw.ellipse([8, 6, 36, 34], outline=COLORS[color], width=4)
        else:
            draw.line([8, 6, 36, 34], fill=COLORS[color], width=5)
            draw.line([36, 6, 8, 34], fill=COLORS[color], width=5)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        name = f"{color} {shape}"
        samples.append(
            Sample(f"toy/{name}", ImageRef(data=buffer.getvalue()), (Caption(f"a {name}"),), label=name)
        )  # fmt: skip
    return DataSource("toy", samples, licences=(("toy pictures", "CC0-1.0", "pocketvlm's tests"),))


def toy_student(seed: int = 0) -> Any:
    texts = [caption.text for sample in toy_data().samples for caption in sample.captions]
    return build_student(
        "timm:test_efficientnet",
        embed_dim=32,
        tokenizer_json=train_tokenizer([*texts, "picture of the dog and 0123456789"], 200),
        seed=seed,
        overrides={
            "image.size": 32,
            "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 12},
        },
    ).eval()


def example(student: Any, tower: str) -> np.ndarray:
    if tower == "image":
        size = student.image_spec.size
        return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    ids = np.zeros((2, student.text_spec.context_length), np.int32)
    ids[:, :4] = 2
    return ids


def export_tower(student: Any, tower: str, path: Path, module: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    module = module or (deploy_image(student) if tower == "image" else deploy_text(student))
    export_graph(module, example(student, tower), tower, path, contract_digest="toy")  # type: ignore[arg-type]


def sign(folder: Path, **fields: Any) -> None:
    """(Re)write bundle.json over the files that lie there; `fields` replace its entries."""
    path = folder / "bundle.json"
    raw = json.loads(path.read_text()) if path.is_file() else {"schema_version": "1.0", "kit_version": "0.1.0"}
    raw |= {"created": "2026-11-22", "tokenizer": "tokenizer.json", "provenance": {}, "parity": [], "licences": []}
    raw |= fields
    if "contract" in fields:
        # of an exported bundle: it is the contract's own, as an exporter with this fault would have written it
        raw["contract_sha256"] = ModelContract.from_dict(raw["contract"]).digest()
    raw["files"] = describe_files(folder)
    path.write_text(json.dumps(raw, indent=1))


def variant(target: str = "onnx", precision: str = "fp32", image: str = "", text: str = "") -> dict[str, Any]:
    files = {"image": image or f"onnx/image-{precision}.onnx", "text": text or f"onnx/text-{precision}.onnx"}
    return {"target": target, "precision": precision, "dim": None, "files": files, "batch": "dynamic", "notes": {}}


def make_bundle(student: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    for tower in ("image", "text"):
        export_tower(student, tower, folder / f"onnx/{tower}-fp32.onnx")
    (folder / "tokenizer.json").write_bytes(student.tokenizer_json)
    sign(folder, contract=student.contract.to_dict(), variants=[variant()])
    return folder
