"""`check_vlm_parity`: does a bundle say what the student says, step by step, word for word, and as often rightly?

Three kinds of proof, because each alone misleads. Logits: the student's own greedy answer is fed to the files token by
token, and every step's logits are compared with the unpatched student. Text: the files answer by themselves. Task:
questions with a known answer, paired question by question. Held to a recorded reference, nothing here needs torch.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.data.exact_match import exact_match
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.vlm import EdgeVLM
from pocketvlm.edge.vlm_bundle import VlmBundle
from pocketvlm.export.budgets import Status, task_verdict
from pocketvlm.export.compare import PairedChange, finite, paired_change
from pocketvlm.export.vlm.reference import Case, VlmReference, kl, load_vlm_reference, log_sum

SCHEMA_VERSION = "1.1"
# float32 files: times what the student itself loses in float32 against float64 (the largest of both over all cases)
NOISE_FACTOR = 10.0
# points of exact match that a reduced precision may lose (docs/vlm-export.md)
TASK_POINTS = 1.0
RUN_HERE = ("onnx", "executorch")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Divergence:
    """Where greedy decoding of a file first takes another token than the student. step: of the answer, from 0.
    margin: between the student's two best logits there."""

    case: int
    prompt: str
    step: int
    expected: str
    found: str
    margin: float


@dataclass(frozen=True)
class Checked:
    """One variant against the student. max_abs: of logits, of all where the case has all, else of the student's two
    best and of the log-sum-exp. kl_mean, kl_max: KL(student || file) of a step, in nats, over the `kl_steps` whose
    every logit is known. same_choice: share of steps with the same best token. identical: greedy answers that are the
    same text. lost, gained: questions that only the student, or only the file, answers rightly; loss: their difference
    in points of exact match, interval: 95 % bootstrap of it, bound, floor: one-sided 95 % bounds (`PairedChange`).

    status: "fail" where `failures` has a sentence, else "undecided" where `open` has one, else "pass". files: sha256 of
    what was checked.
    """

    target: str
    precision: str
    status: Status
    failures: list[str]
    open: list[str]
    prompts: int
    steps: int
    max_abs: float
    kl_mean: float
    kl_max: float
    kl_steps: int
    same_choice: float
    identical: int
    divergences: list[Divergence]
    questions: int
    accuracy: float | None
    lost: int
    gained: int
    loss: float | None
    interval: tuple[float, float] | None
    bound: float | None
    floor: float | None
    files: dict[str, str]

    @property
    def message(self) -> str:
        """One sentence: what failed, or what is open, or what was proved."""
        if self.failures or self.open:
            return "; ".join(self.failures or self.open)
        words = f"{self.identical} of {self.prompts} answers are the student's"
        if self.precision == "fp32":
            return f"{words}, and logits within {NOISE_FACTOR:g} times what the student itself loses in float32"
        return f"{words}, and exact match loses no more than {TASK_POINTS:g} point (95 % bound {self.bound:+.2f})"


@dataclass(frozen=True)
class VlmParity:
    """reference: who answered for the student: "recorded" (with sha256, dtype, device and date) or not. noise: largest
    difference of the student's own logits in float32 from float64; noise_kl in nats. accuracy: exact match of the
    student. not_run: variants that no runtime of this machine takes.

    status: "pass", "undecided" (nothing failed, but too few questions were asked to decide), or "fail". exit_code: 0
    for "pass" and "undecided", else 1.
    """

    bundle: str
    model_id: str
    fold: int
    reference: dict[str, Any]
    noise: float
    noise_kl: float
    accuracy: float | None
    variants: list[Checked]
    not_run: list[str]
    date: str = ""

    @property
    def status(self) -> Status:
        found = {variant.status for variant in self.variants}
        if "fail" in found or not found:
            return "fail"
        return "undecided" if "undecided" in found else "pass"

    @property
    def exit_code(self) -> int:
        return 0 if self.status in ("pass", "undecided") else 1

    def to_dict(self) -> dict[str, Any]:
        own = asdict(self)
        for row, variant in zip(own["variants"], self.variants):
            row["message"] = variant.message
        return finite({"schema_version": SCHEMA_VERSION, "status": self.status, **own})

    def rows(self) -> list[dict[str, Any]]:
        """A line for each variant."""
        return [
            {
                "variant": f"{v.target} {v.precision}",
                "result": "FAIL" if v.status == "fail" else v.status,
                "max |Δ logit|": f"{v.max_abs:.2g}",
                "mean KL": f"{v.kl_mean:.2g}",
                "same token": f"{100 * v.same_choice:.1f} %",
                "same answer": f"{v.identical} of {v.prompts}",
                "task loss": "-" if v.loss is None or v.interval is None else _points(v.loss, v.interval),
                "95 % bound": "-" if v.bound is None else f"{v.bound:+.2f}",
                "questions": v.questions,
            }
            for v in self.variants
        ]


def check_vlm_parity(
    bundle: str | Path,
    model: str | Path | None = None,
    *,
    reference: str | Path | None = None,
    prompts: int = 100,
    questions: int = 1000,
    fold: int = 0,
    targets: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    threads: int | None = None,
    limit: int | None = None,
    progress: Progress = lambda line: None,
) -> VlmParity:
    """Compare every variant of a bundle that runs here with the student it was made of.

    Args:
        model: the folder of `save_vlm`, which then answers in float32 on the CPU, its logits in float64.
        reference: instead, a folder of `record_vlm_reference`; prompts, questions, fold and limit are then its own.
        prompts: questions, each about a scene of its own of the test pool, for logits and text. questions: for exact
            match, up to four about a scene; 0 leaves the task out. fold: of the pool.
        targets, precisions: only those. limit: the first so many pictures of the pool only, for a toy.

    Raises:
        UsageError: both or neither of model and reference, no prompts, no such folder, or no variant that can run.
        IntegrityError: the bundle was made of another model, or the reference is damaged.
    """
    if (model is None) == (reference is None):
        raise UsageError(
            f"{'neither' if model is None else 'both'} of a model and a reference {'was' if model is None else 'were'} "
            "given, and the files are held to one of them; give --model FOLDER or --reference FOLDER"
        )
    opened = VlmBundle.load(bundle)
    chosen = [
        v
        for v in opened.variants
        if (targets is None or v.target in targets) and (precisions is None or v.precision in precisions)
    ]
    runnable = [v for v in chosen if v.target in RUN_HERE]
    if not runnable:
        raise UsageError(
            f"the bundle holds {', '.join(f'{v.target} {v.precision}' for v in opened.variants) or 'no variants'}, of "
            "which none that was chosen runs here; nothing would be proved, so export onnx or executorch files"
        )
    if reference is not None:
        told = load_vlm_reference(reference)
        _same_model(opened, told.model_id, reference)
    else:
        from pocketvlm.export.vlm.reference_write import answer_now, draw, model_id_of
        from pocketvlm.students.vlm import load_vlm

        assert model is not None, "one of both was given"
        student = load_vlm(model)
        model_id = model_id_of(student, Path(model))
        _same_model(opened, model_id, model)
        drawn = draw(student, prompts=prompts, questions=questions, fold=fold, limit=limit)
        told = answer_now(student, model_id, drawn, fold, progress)
    expected = [question.right for question in told.task]
    checked = []
    for variant in runnable:
        progress(f"{variant.target} {variant.precision}")
        edge = EdgeVLM.load(opened, variant.target, variant.precision, threads)  # type: ignore[arg-type]
        _remember_picture(edge)
        right = [
            exact_match(edge.generate(q.pixels, q.text, max_new_tokens=q.longest).text, q.answer) for q in told.task
        ]
        checked.append(compare(edge, told.cases, told.noise, (expected, right)))
    return VlmParity(
        Path(bundle).name,
        told.model_id,
        told.fold,
        _about(told),
        told.noise,
        told.noise_kl,
        float(np.mean(expected)) if expected else None,
        checked,
        [f"{v.target} {v.precision}" for v in chosen if v.target not in RUN_HERE],
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _same_model(bundle: VlmBundle, model_id: str, given: str | Path) -> None:
    if bundle.contract.model_id != model_id:
        raise IntegrityError(
            f"the bundle was made of {bundle.contract.model_id} and {str(given)!r} is of {model_id}; differences would "
            "be those of two models, so give the folder that was exported, or a recording of it"
        )


def _about(told: VlmReference) -> dict[str, Any]:
    if told.manifest is None:
        return {"recorded": False, "dtype": "float64", "device": "cpu"}
    numerics, machine = told.manifest["numerics"], told.manifest["environment"]
    return {
        "recorded": True,
        "sha256": told.digest,
        "dtype": numerics["dtype"],
        "device": machine["device"],
        "device_name": machine["device_name"],
        "date": told.manifest["date"],
    }


def compare(edge: EdgeVLM, cases: Sequence[Case], noise: float, task: tuple[list[bool], list[bool]]) -> Checked:
    """One variant against recorded cases, and paired answers of the student and of the variant that were right."""
    gaps, divergence, choices = list[float](), list[float](), list[bool]()
    differing: list[Divergence] = []
    identical = 0
    for number, case in enumerate(cases):
        logits = forced(edge, case)
        gaps.append(_gap(case, logits))
        if case.logits is not None:
            divergence += kl(case.logits, logits).tolist()
        choices += (logits.argmax(1) == np.array(case.said)).tolist()
        answer = edge.generate(case.pixels, case.prompt, max_new_tokens=len(case.said))
        end = edge.contract.template.end
        found = [*answer.ids, *([end] if answer.ended else [])]
        identical += answer.text == case.text and found == case.said
        if found != case.said:
            differing.append(_divergence(edge, number, case, found))
    expected, right = task
    lost, gained = (sum(a and not b for a, b in pairs) for pairs in (zip(expected, right), zip(right, expected)))
    change = paired_change(lost, gained, len(expected)) if expected else None
    precision, worst = edge.variant.precision, float(np.max(gaps))
    failures, open_ = [], list[str]()
    if not np.isfinite(gaps).all():
        failures.append("logits are not finite")
    if precision == "fp32":
        if identical < len(cases):
            failures.append(f"{len(cases) - identical} of {len(cases)} greedy answers differ, and none may")
        if not worst <= NOISE_FACTOR * noise:
            failures.append(
                f"logits differ by {worst:.2g}, more than {NOISE_FACTOR:g} times the student's own {noise:.2g}"
            )
        if lost or gained:
            failures.append(f"{lost} of {len(expected)} questions are lost and {gained} gained, and none may change")
    else:
        _judge_task(change, failures, open_)
    return Checked(
        target=edge.variant.target,
        precision=precision,
        status="fail" if failures else "undecided" if open_ else "pass",
        failures=failures,
        open=open_,
        prompts=len(cases),
        steps=len(choices),
        max_abs=worst,
        kl_mean=float(np.mean(divergence)),
        kl_max=float(max(divergence)),
        kl_steps=len(divergence),
        same_choice=float(np.mean(choices)),
        identical=identical,
        divergences=differing,
        questions=len(expected),
        accuracy=float(np.mean(right)) if right else None,
        lost=lost,
        gained=gained,
        loss=None if change is None else 100 * change.loss,
        interval=None if change is None else (100 * change.interval[0], 100 * change.interval[1]),
        bound=None if change is None else 100 * change.bound,
        floor=None if change is None else 100 * change.floor,
        files=edge.bundle.hashes(edge.variant),
    )


def _judge_task(change: PairedChange | None, failures: list[str], open_: list[str]) -> None:
    """Only a loss that is shown to be larger than the budget fails; only a bound within it passes."""
    if change is None:
        open_.append("no questions were asked, so how often it is right is not known; raise --questions")
        return
    status, text = task_verdict(change, TASK_POINTS / 100, of="questions", more="ask more of them")
    if status == "fail":
        failures.append(f"the task loses more than {TASK_POINTS:g} point: {text}")
    elif status == "undecided":
        open_.append(text)


def _gap(case: Case, found: NDArray[np.float64]) -> float:
    """Largest difference of a logit, as far as the student's are known; NaN where one is not finite."""
    if case.logits is not None:
        return float(np.abs(found - case.logits).max())
    best = np.take_along_axis(found, case.best, axis=1)
    # a log-sum-exp never differs by more than the logit that differs most
    return float(max(np.abs(best - case.best_logits).max(), np.abs(log_sum(found) - case.log_sum).max()))


def _remember_picture(edge: EdgeVLM) -> None:
    """Questions about one scene follow each other: its picture is looked at once."""
    look, last = edge.backend.picture, list[tuple[bytes, NDArray[np.float32]]]()

    def picture(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        key = pixels.tobytes()
        if not last or last[0][0] != key:
            last[:] = [(key, look(pixels))]
        return last[0][1]

    edge.backend.picture = picture  # type: ignore[method-assign]


def forced(edge: EdgeVLM, case: Case) -> NDArray[np.float64]:
    """Logits [n, V] of a file while it is fed the student's answer."""
    decoding, logits = edge.prefill(case.pixels, case.ids)
    place = edge.contract.prefix + len(case.ids)
    found = [logits.astype(np.float64)]
    for step, token in enumerate(case.said[:-1]):
        found.append(decoding.decode(token, place + step).astype(np.float64))
    return np.stack(found)


def _divergence(edge: EdgeVLM, number: int, case: Case, found: list[int]) -> Divergence:
    step = next((i for i, (a, b) in enumerate(zip(case.said, found)) if a != b), min(len(case.said), len(found)))

    def piece(ids: list[int]) -> str:
        if step >= len(ids):
            return ""
        return "<EOS>" if ids[step] == edge.contract.template.end else edge.text.decode([ids[step]])

    margin = float(case.margins[min(step, len(case.said) - 1)])
    return Divergence(number, case.prompt, step, piece(case.said), piece(found), margin)


def _points(loss: float, interval: tuple[float, float]) -> str:
    return f"{loss:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def write_report(report: VlmParity, path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_vlm_summary(bundle: str | Path, report: VlmParity) -> None:
    """The verdict on every variant into bundle.json (`parity_summary.write_verdict`), where `EdgeVLM.bundle.parity`
    has it.

    Raises:
        UsageError: not a bundle folder, or the report is about another model, other files or fewer variants.
    """
    from pocketvlm.export.parity_summary import write_verdict

    opened = VlmBundle.load(bundle, verify=False)
    checked = {(v.target, v.precision) for v in report.variants}
    left = [f"{v.target} {v.precision}" for v in opened.variants if (v.target, v.precision) not in checked]
    left = [name for name in left if name not in report.not_run]
    if left:
        raise UsageError(
            f"the report says nothing about {', '.join(left)}, whose earlier verdict would be lost; check every "
            "variant before their verdicts are written"
        )
    files = {name: digest for variant in report.variants for name, digest in variant.files.items()}
    write_verdict(bundle, report.model_id, files, vlm_parity_summary(report))


def vlm_parity_summary(report: VlmParity) -> list[dict[str, Any]]:
    """One short entry per variant for bundle.json: the verdict, the main numbers, and what they were held to."""
    kept = ("prompts", "identical", "max_abs", "kl_mean", "questions", "lost", "gained", "loss", "bound")
    checked = [
        {
            "target": v.target,
            "precision": v.precision,
            "status": v.status,
            "message": v.message,
            **{key: getattr(v, key) for key in kept},
            "accuracy": {"reference": report.accuracy, "candidate": v.accuracy},
            "reference": report.reference,
            "date": report.date,
        }
        for v in report.variants
    ]
    message = "no runtime of the machine that checked the others runs it"
    return finite(
        [
            *checked,
            *(
                {"target": target, "precision": precision, "status": "not-run", "message": message, "date": report.date}
                for target, precision in (name.split() for name in report.not_run)
            ),
        ]
    )
