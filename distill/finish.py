"""After the last step: the student is saved and scored, and the report is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketvlm.distill.evaluate import Evaluation
from pocketvlm.distill.labels import mix_heads
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.run_folder import STUDENT
from pocketvlm.distill.trackers import open_log
from pocketvlm.students import save_student

if TYPE_CHECKING:
    from pocketvlm.distill.loop import Trainer


@dataclass(frozen=True)
class RunResult:
    """A finished run. final_loss: of the last step. seconds: spent in steps by this process.
    licences: (what, licence, attribution) of data, teacher and initial weights. rank: of this process; only rank 0 has
    an evaluation."""

    folder: Path
    student: Path
    report: Path
    evaluation: Evaluation | None
    final_loss: float
    steps: int
    seconds: float
    licences: tuple[tuple[str, str, str], ...] = ()
    rank: int = 0


def finish(trainer: Trainer, out: Path, report: Reporter) -> Evaluation | None:
    """Save and score the trained student, and write the report."""
    from pocketvlm.distill.report import write_report

    prepared = trainer.prepared
    with trainer.averaged():
        if prepared.task is not None:
            report.line(mix_heads(prepared, trainer.student, trainer.feed))
        save_student(trainer.student, out / STUDENT, overwrite=True)
        evaluation = trainer.evaluate()
    if evaluation is not None:
        evaluation.save(out)
        log = open_log(out, trainer.recipe, trainer.step, report.line)
        log.write({"step": trainer.step, "final": True, **scores(evaluation)})
        log.close()
    write_report(out, prepared.questions, evaluation, licences=prepared.licences)
    return evaluation


def scores(evaluation: Evaluation) -> dict[str, float]:
    """The shares of an evaluation as one flat row of metrics.jsonl."""
    own = evaluation.values["model"]
    return {f"eval/{part}/{key}": own[part][key] for part in own for key in own[part] if "@" in key or "top" in key}
