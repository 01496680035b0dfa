"""The classes of a task and who may learn which label: decided once, from the training data alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocketvlm.data.sample import Sample
from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.questions import prompt
from pocketvlm.edge.errors import UsageError, counted
from pocketvlm.students import Classes, Student
from pocketvlm.students.task import SHARES, choose_mixing

if TYPE_CHECKING:
    from pocketvlm.distill.feed import Feed
    from pocketvlm.distill.prepare import Prepared
    from pocketvlm.distill.recipe import Recipe


@dataclass(frozen=True)
class TaskLabels:
    """classes: of the task. train: index of each training sample's class, -1 where the heads may not learn it.
    held: the same for the labelled samples that choose the mixing, -1 elsewhere; no sample is in both."""

    classes: Classes
    train: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def prompts(self) -> list[list[str]]:
        """Of each class, its name in every template."""
        return [[prompt(t, label) for t in self.classes.templates] for label in self.classes.labels]


def task_classes(recipe: Recipe, samples: Sequence[Sample], name: str, templates: Sequence[str]) -> Classes | None:
    """The classes of the recipe's task; None without one. name: of the data. templates: prompts of a class.

    Raises:
        UsageError: labels are wanted and there are none, fewer than two classes, or a label that is no class.
    """
    from pocketvlm.distill.objectives import objective_options

    task = recipe.task
    if task is None:
        return None
    labels = sorted({sample.label for sample in samples if sample.label is not None})
    default = objective_options("dho")["label_weight"]
    wanted = any(s.options.get("label_weight", default) for s in recipe.objectives if s.name == "dho")
    if wanted and not labels:
        raise UsageError(
            f"objective 'dho' learns from labels and none of the {len(samples)} pictures of {name} has one, so its "
            "head would stay as it is; give data with a label column or class folders, or set its label_weight to 0"
        )
    classes = task.classes or tuple(labels)
    if len(classes) < 2:
        raise UsageError(
            f"the task has the classes {list(classes)} and a classifier needs at least two, or it would have nothing "
            "to tell apart; give data with more labels, or list them in task.classes"
        )
    if strange := sorted(set(labels) - set(classes)):
        raise UsageError(
            f"pictures of {name} are labelled {strange[0]!r}, which is not in task.classes, so they could only be "
            "taught wrongly; add the class, or leave these pictures out"
        )
    return Classes(classes, tuple(templates), task.mix)


def task_labels(classes: Classes, samples: Sequence[Sample], validation: float) -> TaskLabels:
    """Hold the share `validation` of each class's labels back, rounded down, by a stable hash of the uid."""
    place = {label: index for index, label in enumerate(classes.labels)}
    of_class: dict[int, list[int]] = {}
    for row, sample in enumerate(samples):
        if sample.label is not None:
            of_class.setdefault(place[sample.label], []).append(row)
    train, held = [-1] * len(samples), [-1] * len(samples)
    for index, rows in of_class.items():
        rows.sort(key=lambda row: (stable_hash(f"validation:{samples[row].uid}"), row))
        count = int(validation * len(rows))
        for at, row in enumerate(rows):
            (held if at < count else train)[row] = index
    return TaskLabels(classes, tuple(train), tuple(held))


def mix_heads(prepared: Prepared, student: Student, feed: Feed) -> str:
    """Set how the student's two heads are mixed, by the recipe or by the held-out labels; says what was done."""
    task, heads, section = prepared.task, student.heads, prepared.recipe.task
    assert task is not None, "only a recipe with a task comes here"
    assert heads is not None, "only a recipe with a task comes here"
    assert section is not None, "only a recipe with a task comes here"
    rows = [row for row, label in enumerate(task.held) if label >= 0]
    share, temperature = float(heads.share), float(heads.temperature)
    if rows and (section.share is None or section.temperature is None):
        label = torch.tensor([task.held[row] for row in rows])
        shares = SHARES if section.share is None else (section.share,)
        share, temperature = choose_mixing(*feed.class_logits(student, rows), label, section.mix, shares)
    heads.share.fill_(share if section.share is None else section.share)
    heads.temperature.fill_(temperature if section.temperature is None else section.temperature)
    return (
        f"classifier: {float(heads.share):.2f} of the taught head at temperature {float(heads.temperature):g}, "
        f"mixed by {section.mix}, {counted(len(rows), 'label')} held out for the choice"
    )
