"""Frozen sources of knowledge behind one protocol, and the cache that keeps their outputs.

teacher = load_teacher("openmoji-lit?fold=0")          built in, composed, made on this machine
teacher = load_teacher("ingredients")                  built in, the same models without the trained map
teacher = load_teacher("open_clip:ViT-B-32@w.safetensors")
teacher = load_teacher("hf:FOLDER")                    CLIP, SigLIP, fixed-resolution SigLIP 2
teacher = load_teacher("embeddings:FOLDER")            precomputed, black box
teacher = load_teacher("minilm")                       built in, texts alone
teacher = load_teacher("hf-text:FOLDER?pooling=last")  an encoder or language model, texts alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

if __name__ != "pocketvlm.teachers":
    raise ImportError(
        "import this package as pocketvlm.teachers; a second copy under 'teachers' would duplicate every class"
    )

from pocketvlm.edge.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from pocketvlm.teachers.base import Teacher
    from pocketvlm.teachers.files import Progress

__all__ = ["TeacherInfo", "list_teachers", "load_teacher"]


@dataclass(frozen=True)
class TeacherInfo:
    """One kind of teacher. spec: how to write it; extra: what `pip install 'pocketvlm[extra]'` brings it."""

    kind: str
    spec: str
    description: str
    extra: str


_KINDS = (
    TeacherInfo(
        "openmoji-lit",
        "openmoji-lit?fold=0..4[&precision=bfloat16]",
        "built in: EfficientNet-Lite2 features joined to MiniLM sentence vectors on the fold's teacher pool (not CLIP)",
        "demo",
    ),
    TeacherInfo(
        "ingredients",
        "ingredients",
        "built in: the same two models without the trained map (ImageNet evidence x class names); the control",
        "demo",
    ),
    TeacherInfo(
        "open_clip",
        "open_clip:NAME@WEIGHTS_FILE_OR_TAG | open_clip:CONFIG.json@WEIGHTS_FILE | open_clip:FOLDER",
        "any open_clip dual encoder, from local files or a published tag",
        "open-clip",
    ),
    TeacherInfo(
        "hf",
        "hf:FOLDER | hf:ORG/NAME",
        "Hugging Face CLIP, SigLIP or fixed-resolution SigLIP 2",
        "hf",
    ),
    TeacherInfo(
        "embeddings",
        "embeddings:FOLDER",
        "precomputed embeddings: a teacher cache, or .npy arrays imported by teachers.precomputed.import_embeddings",
        "distill",
    ),
    TeacherInfo("minilm", "minilm", "texts alone, built in: the sentence encoder all-MiniLM-L6-v2", "demo"),
    TeacherInfo(
        "hf-text",
        "hf-text:FOLDER | hf-text:ORG/NAME, and [?pooling=mean|last|first&layer=N&prompt=query:+{}]",
        "texts alone: a Hugging Face encoder or decoder language model, pooled to sentence vectors",
        "hf",
    ),
)


def list_teachers() -> list[TeacherInfo]:
    """The kinds of teachers that `load_teacher` knows."""
    return list(_KINDS)


def load_teacher(
    spec: str,
    *,
    device: str = "cpu",
    allow_download: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Teacher:
    """Load a frozen teacher.

    spec: see `list_teachers`. device: as in `teachers.device.pick_device`. allow_download: permit the network for
    a hub id or tag that is not on this machine (nothing is ever downloaded otherwise). trust_remote_code: run
    Python code that comes with a Hugging Face checkpoint. progress: called as (done, total, what) while the
    built-in teacher is made.

    Raises:
        UnknownNameError: no such kind, option, architecture or tag (the nearest is suggested).
        UsageError: files or options that cannot work. MissingExtraError: a package is absent; names its extra.
        IntegrityError: files that are not what their manifest says.
    """
    body, _, query = spec.partition("?")
    kind, colon, target = body.partition(":")
    options = _options(spec, query)
    kinds = [info.kind for info in _KINDS]
    if kind not in kinds:
        raise unknown_name("teacher", kind, kinds)
    if kind == "openmoji-lit":
        _known_options(kind, options, ("fold", "precision"))
        fold = options.get("fold", "0")
        if colon or not fold.isdigit():
            raise UsageError(f"teacher {spec!r} is not written as expected; write openmoji-lit?fold=0 (folds 0 to 4)")
        from pocketvlm.teachers.lit import load_lit_teacher

        precision = options.get("precision", "float32")
        return load_lit_teacher(int(fold), precision=precision, device=device, progress=progress)
    _known_options(kind, options, ("pooling", "layer", "prompt") if kind == "hf-text" else ())
    if kind in ("ingredients", "minilm"):
        if colon:
            raise UsageError(f"teacher {spec!r} is not written as expected; write {kind}, which takes no folder")
        from pocketvlm.teachers.ingredients import load_ingredients
        from pocketvlm.teachers.sentence import load_minilm

        return load_ingredients(device) if kind == "ingredients" else load_minilm(device)
    if not target:
        form = next(info.spec for info in _KINDS if info.kind == kind)
        raise UsageError(f"teacher {spec!r} does not say which one; write {form}")
    if kind == "open_clip":
        from pocketvlm.teachers.open_clip import load_open_clip

        return load_open_clip(target, device=device, allow_download=allow_download)
    if kind == "hf":
        from pocketvlm.teachers.hf import load_hf

        return load_hf(target, device=device, allow_download=allow_download, trust_remote_code=trust_remote_code)
    if kind == "hf-text":
        from pocketvlm.teachers.sentence import load_hf_text

        network = {"allow_download": allow_download, "trust_remote_code": trust_remote_code}
        return load_hf_text(target, device=device, **network, **options)  # type: ignore[arg-type]
    from pocketvlm.teachers.precomputed import load_precomputed

    return load_precomputed(target)


def _options(spec: str, query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise UsageError(f"the options of teacher {spec!r} cannot be read; write ?key=value&key=value") from error


def _known_options(kind: str, options: dict[str, str], known: tuple[str, ...]) -> None:
    for key in options:
        if key not in known:
            raise unknown_name(f"option of teacher {kind}", key, known or ["(none)"])
