"""The objectives: what a student is pulled towards. docs/objectives.md has the table of formulas.

An objective is built by name with `build_objective` and called with keyword-only `Outputs` of a whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pocketvlm.distill.objectives.afd import AugmentedFeature
from pocketvlm.distill.objectives.affinity import AffinityMimicking
from pocketvlm.distill.objectives.bank import Bank
from pocketvlm.distill.objectives.base import Needs, Objective, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths
from pocketvlm.distill.objectives.contrastive import Contrastive
from pocketvlm.distill.objectives.correlation import CorrelationCongruence
from pocketvlm.distill.objectives.crd import ContrastiveRelational
from pocketvlm.distill.objectives.cross_kd import CrossDistributions
from pocketvlm.distill.objectives.cwcl import ContinuouslyWeighted
from pocketvlm.distill.objectives.dho import DualHead
from pocketvlm.distill.objectives.feature import Feature
from pocketvlm.distill.objectives.gradient import GradientDistillation
from pocketvlm.distill.objectives.gram import Gram
from pocketvlm.distill.objectives.hint import Hint
from pocketvlm.distill.objectives.hycd import HybridContrastive
from pocketvlm.distill.objectives.icl import Interactive
from pocketvlm.distill.objectives.masked_feature import MaskedFeature
from pocketvlm.distill.objectives.masked_language import MaskedLanguage
from pocketvlm.distill.objectives.matryoshka import Matryoshka
from pocketvlm.distill.objectives.matryoshka_2d import Matryoshka2D
from pocketvlm.distill.objectives.momentum import MomentumDistillation
from pocketvlm.distill.objectives.multi_positive import DistributionMatching
from pocketvlm.distill.objectives.multi_teacher import MultiTeacher
from pocketvlm.distill.objectives.order import NeighbourOrder
from pocketvlm.distill.objectives.rafa import RandomFeatureAlignment
from pocketvlm.distill.objectives.rankclip import RankConsistency
from pocketvlm.distill.objectives.region_self import RegionSelf
from pocketvlm.distill.objectives.rkd import RelationalKD
from pocketvlm.distill.objectives.siglip import PairwiseSigmoid
from pocketvlm.distill.objectives.soft_negatives import SoftNegatives
from pocketvlm.distill.objectives.token_alignment import TokenAlignment
from pocketvlm.distill.objectives.token_gram import TokenGram
from pocketvlm.distill.objectives.vl2v import VisionLanguageToVision
from pocketvlm.edge.errors import UsageError, unknown_name

__all__ = [
    "Needs",
    "Objective",
    "Outputs",
    "Widths",
    "build_objective",
    "list_objectives",
    "objective_class",
    "objective_needs",
    "objective_options",
    "objective_taps",
]

_CLASSES: dict[str, type[BatchObjective]] = {
    cls.name: cls
    for cls in (
        AffinityMimicking,
        AugmentedFeature,
        Bank,
        ContinuouslyWeighted,
        Contrastive,
        ContrastiveRelational,
        CorrelationCongruence,
        CrossDistributions,
        DistributionMatching,
        DualHead,
        Feature,
        GradientDistillation,
        Gram,
        Hint,
        HybridContrastive,
        Interactive,
        MaskedFeature,
        MaskedLanguage,
        Matryoshka,
        Matryoshka2D,
        MomentumDistillation,
        MultiTeacher,
        NeighbourOrder,
        PairwiseSigmoid,
        RandomFeatureAlignment,
        RankConsistency,
        RegionSelf,
        RelationalKD,
        SoftNegatives,
        TokenAlignment,
        TokenGram,
        VisionLanguageToVision,
    )
}
_BUILT_WITH = ("self", "student", "teacher", "seed")


def list_objectives() -> list[str]:
    """Registered names, sorted."""
    return sorted(_CLASSES)


def objective_class(name: str) -> type[BatchObjective]:
    """The class registered as `name`; its docstring holds the formula.

    Raises:
        UnknownNameError: no such objective.
    """
    if name not in _CLASSES:
        raise unknown_name("objective", name, _CLASSES)
    return _CLASSES[name]


def objective_needs(name: str, options: Mapping[str, Any] | None = None) -> Needs:
    """What `name` must be given when built with `options`, known before it is built.

    Raises:
        UnknownNameError: no such objective. UsageError: options that cannot work.
    """
    return objective_class(name).needs_with(options or {})


def objective_options(name: str) -> dict[str, Any]:
    """Option names of `name` with their defaults.

    Raises:
        UnknownNameError: no such objective.
    """
    parameters = inspect.signature(objective_class(name).__init__).parameters
    return {key: item.default for key, item in parameters.items() if key not in _BUILT_WITH}


def objective_taps(name: str, options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The inner activations that `name` reads when built with `options`: {"student_tap": name, ...}, see `Needs`.

    Raises:
        UnknownNameError: no such objective. UsageError: a tap that is no name.
    """
    given, defaults, found = options or {}, objective_options(name), {}
    for option in objective_needs(name, given).taps:
        tap = given.get(option, defaults[option])
        if not isinstance(tap, str) or not tap:
            raise UsageError(
                f"option {option!r} of objective {name!r} is {tap!r} but must name an inner activation; there would be "
                "nothing to read, so give 'tokens' or a part of the tower"
            )
        found[option] = tap
    return found


def _refuse_senseless(name: str, option: str, value: Any) -> None:
    """What no objective could mean by an option, told by its annotation; its number is the objective's to check."""
    meant = str(inspect.signature(objective_class(name).__init__).parameters[option].annotation)
    given = f"option {option!r} of objective {name!r} is {'null' if value is None else repr(value)}"
    if value is None and "None" not in meant:
        raise UsageError(f"{given}, which means nothing there; give a value, or leave it out for its default")
    if meant == "bool" and not isinstance(value, bool):
        raise UsageError(
            f"{given} but must be true or false; any other word would count as true, so write one of these"
        )
    listed = isinstance(value, (list, tuple)) or (isinstance(value, str) and meant.endswith("| str"))
    if value is not None and meant.startswith("Sequence") and not listed:
        raise UsageError(f"{given} but must be a list; its parts could not be told apart, so write [...]")


def build_objective(
    name: str, *, student: Widths, teacher: Widths | None = None, seed: int = 0, **options: Any
) -> BatchObjective:
    """Build a registered objective.

    Args:
        student, teacher: widths of the two models' outputs; they size the projectors. teacher may be None for an
            objective without one.
        seed: of the projectors; equal seeds give equal projectors on every rank, whatever the global generators hold.
        options: as `objective_options(name)` lists them.

    Raises:
        UnknownNameError: unknown objective or option value. UsageError: unknown option, or options that cannot work.
    """
    cls = objective_class(name)
    known = objective_options(name)
    for key in options:
        if key not in known:
            raise (
                unknown_name(f"option of objective {name!r}", key, known)
                if known
                else UsageError(f"objective {name!r} takes no options but {key!r} was given; remove it")
            )
        _refuse_senseless(name, key, options[key])
    if cls.needs_with(options).teacher and teacher is None:
        raise UsageError(
            f"objective {name!r} learns from a teacher and none was given; name a teacher in the recipe or leave the "
            "objective out"
        )
    return cls(student=student, teacher=teacher, seed=seed, **options)  # type: ignore[call-arg]
