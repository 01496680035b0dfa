"""`check_vlm_parity`: does a bundle say what the student says, step by step, word for word, and as often rightly?

Three kinds of proof, because each alone misleads. Logits: the student's own greedy answer is fed to the files token by
token, and every step's logits are compared with the unpatched student in float64. Text: the files answer by themselves.
Task: questions with a known answer, paired question by question.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocketvlm.data.exact_match import exact_match
from pocketvlm.data.scenes import SceneTable, picture_set
from pocketvlm.distill.vlm.evaluate import drawn_questions, longest_answer
from pocketvlm.edge.bundle import sha256_file
from pocketvlm.edge.contract import identity
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.vlm import EdgeVLM
from pocketvlm.edge.vlm_bundle import VlmBundle
from pocketvlm.export.compare import paired_change
from pocketvlm.students.vlm import Vlm, load_vlm
from pocketvlm.students.vlm.io import MANIFEST
from pocketvlm.students.vlm.model import rows_of
from pocketvlm.students.vlm.tokenizer import EOS

# float32 files: times what the student itself loses in float32 against float64 (the largest of both over all cases)
NOISE_FACTOR = 10.0
# points of exact match that a reduced precision may lose (docs/vlm-export.md)
TASK_POINTS = 1.0
RUN_HERE = ("onnx", "executorch")
_BATCH = 32
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """pixels: uint8 [S, S, 3]. ids: of the prompt. said: the student's greedy answer in float32, the end token
    included where it ended. text: that answer. logits: float64 [n, V] of every token of `said`, in float64."""

    prompt: str
    pixels: NDArray[np.uint8]
    ids: list[int]
    said: list[int]
    text: str
    logits: NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """Where greedy decoding of a file first takes another token than the student. step: of the answer, from 0.
    margin: between the student's two best logits there, in float64."""

    case: int
    prompt: str
    step: int
    expected: str
    found: str
    margin: float


@dataclass(frozen=True)
class Checked:
    """One variant against the student. max_abs: of logits. kl_mean, kl_max: KL(student || file) of a step, in nats.
    same_choice: share of steps with the same best token. identical: greedy answers that are the same text.
    lost, gained: questions that only the student, or only the file, answers rightly; loss: their difference in points
    of exact match, interval: 95 % bootstrap of it. failures: sentences, empty where it passed."""

    target: str
    precision: str
    prompts: int
    steps: int
    max_abs: float
    kl_mean: float
    kl_max: float
    same_choice: float
    identical: int
    divergences: list[Divergence]
    questions: int
    accuracy: float | None
    lost: int
    gained: int
    loss: float | None
    interval: tuple[float, float] | None
    failures: list[str]


@dataclass(frozen=True)
class VlmParity:
    """noise: largest difference of the student's own logits in float32 from float64; noise_kl in nats.
    accuracy: exact match of the student. not_run: variants that no runtime of this machine takes."""

    bundle: str
    model_id: str
    fold: int
    noise: float
    noise_kl: float
    accuracy: float | None
    variants: list[Checked]
    not_run: list[str]

    @property
    def passed(self) -> bool:
        return bool(self.variants) and not any(variant.failures for variant in self.variants)

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}

    def rows(self) -> list[dict[str, Any]]:
        """A line for each variant."""
        return [
            {
                "variant": f"{v.target} {v.precision}",
                "result": "FAIL" if v.failures else "pass",
                "max |Δ logit|": f"{v.max_abs:.2g}",
                "mean KL": f"{v.kl_mean:.2g}",
                "same token": f"{100 * v.same_choice:.1f} %",
                "same answer": f"{v.identical} of {v.prompts}",
                "task loss": "-" if v.loss is None or v.interval is None else _points(v.loss, v.interval),
                "questions": v.questions,
            }
            for v in self.variants
        ]


def check_vlm_parity(
    bundle: str | Path,
    model: str | Path,
    *,
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
        model: the folder of `save_vlm`. prompts: questions, each about a scene of its own of the test pool, for logits
            and text. questions: for exact match, up to four about a scene; 0 leaves the task out. fold: of the pool.
        targets, precisions: only those. limit: the first so many pictures of the pool only, for a toy.

    Raises:
        UsageError: no prompts, no such folder, or no variant that can run. IntegrityError: the bundle was made of
            another model.
    """
    if prompts < 1:
        raise UsageError(f"{prompts} prompts were asked for; nothing would be compared, so give 1 or more")
    opened = VlmBundle.load(bundle)
    student = load_vlm(model)
    model_id = identity(student.config.name, sha256_file(Path(model) / MANIFEST))
    if opened.contract.model_id != model_id:
        raise IntegrityError(
            f"the bundle was made of {opened.contract.model_id} and {str(model)!r} holds {model_id}; differences would "
            "be those of two models, so give the folder that was exported"
        )
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
    pictures = picture_set("test", fold, limit=limit)
    table = SceneTable.build(pictures, student.config.vision.size)
    drawn = drawn_questions(pictures, scenes=max(prompts, -(-questions // 4)))
    scenes = [table.compose(scene) for scene, _ in drawn]
    asked = [(pixels, found[0]) for pixels, (_, found) in zip(scenes, drawn) if found][:prompts]
    progress(f"the student answers {len(asked)} prompts in float32 and float64")
    cases, noise, noise_kl = record_cases(student, [(pixels, q.text, longest_answer(q)) for pixels, q in asked])
    task = [(pixels, q) for pixels, (_, found) in zip(scenes, drawn) for q in found][:questions]
    progress(f"the student answers {len(task)} questions")
    expected = [exact_match(text, q.answer) for text, (_, q) in zip(_answers(student, task), task)]
    checked = []
    for variant in runnable:
        progress(f"{variant.target} {variant.precision}")
        edge = EdgeVLM.load(opened, variant.target, variant.precision, threads)  # type: ignore[arg-type]
        _remember_picture(edge)
        right = [
            exact_match(edge.generate(pixels, q.text, max_new_tokens=longest_answer(q)).text, q.answer)
            for pixels, q in task
        ]
        checked.append(compare(edge, cases, noise, (expected, right)))
    return VlmParity(
        str(bundle),
        model_id,
        fold,
        noise,
        noise_kl,
        float(np.mean(expected)) if expected else None,
        checked,
        [f"{v.target} {v.precision}" for v in chosen if v.target not in RUN_HERE],
    )


@torch.no_grad()
def record_cases(model: Vlm, asked: Sequence[tuple[NDArray[np.uint8], str, int]]) -> tuple[list[Case], float, float]:
    """Cases from (pixels, prompt, longest answer), and what float32 costs the student: max |difference| and mean KL."""
    wide, steps = copy.deepcopy(model).double(), model.for_export()
    cases, gaps, divergence = [], [], []
    for pixels, prompt, longest in asked:
        rows, ids = torch.from_numpy(pixels)[None], model.prompt_ids(prompt)
        said = greedy(steps, rows, ids, longest)
        row = rows_of([[(ids, said)]], len(ids) + len(said))
        logits = wide(rows, row).numpy()
        narrow = model(rows, row).double().numpy()
        gaps.append(np.abs(narrow - logits).max())
        divergence.append(kl(logits, narrow).mean())
        text = model.tokenizer.decode(said[: said.index(EOS)] if EOS in said else said)
        cases.append(Case(prompt, pixels, ids, said, text, logits))
    return cases, float(max(gaps)), float(np.mean(divergence))


@torch.no_grad()
def greedy(model: Vlm, pixels: torch.Tensor, ids: list[int], longest: int) -> list[int]:
    """Ids of `Vlm.generate` for one picture uint8 [1, S, S, 3], the end token included where it comes.

    model: of `Vlm.for_export`.
    """
    decoder = model.decoder
    x = torch.cat([model.picture(pixels), decoder.embed_tokens(torch.tensor([ids]))], dim=1)
    place, cache = x.shape[1], decoder.empty_cache(1)
    hidden, *cache = decoder.step(x, torch.arange(place)[None], *cache, model.prefix - 1)  # type: ignore[assignment]
    said: list[int] = []
    while True:
        said.append(int(decoder.logits(hidden[0, -1]).argmax()))
        if said[-1] == EOS or len(said) >= min(longest, model.config.decoder.context_length - place):
            return said
        positions = torch.tensor([[place + len(said) - 1]])
        hidden, *cache = decoder.step(decoder.embed_tokens(torch.tensor([said[-1:]])), positions, *cache)  # type: ignore[assignment]


def compare(edge: EdgeVLM, cases: Sequence[Case], noise: float, task: tuple[list[bool], list[bool]]) -> Checked:
    """One variant against recorded cases, and paired answers of the student and of the variant that were right."""
    gaps, divergence, choices = [], [], []
    differing: list[Divergence] = []
    identical = 0
    for number, case in enumerate(cases):
        logits = forced(edge, case)
        gaps.append(np.abs(logits - case.logits).max())
        divergence += kl(case.logits, logits).tolist()
        choices += (logits.argmax(1) == np.array(case.said)).tolist()
        answer = edge.generate(case.pixels, case.prompt, max_new_tokens=len(case.said))
        found = [*answer.ids, *([EOS] if answer.ended else [])]
        identical += answer.text == case.text and found == case.said
        if found != case.said:
            differing.append(_divergence(edge, number, case, found))
    expected, right = task
    lost, gained = (sum(a and not b for a, b in pairs) for pairs in (zip(expected, right), zip(right, expected)))
    change = paired_change(lost, gained, len(expected)) if expected else None
    precision = edge.variant.precision
    failures = []
    if not np.isfinite(gaps).all():
        failures.append("logits are not finite")
    if precision == "fp32":
        if identical < len(cases):
            failures.append(f"{len(cases) - identical} of {len(cases)} greedy answers differ, and none may")
        if not max(gaps) <= NOISE_FACTOR * noise:
            failures.append(
                f"logits differ by {max(gaps):.2g}, more than {NOISE_FACTOR:g} times the student's own {noise:.2g}"
            )
    if change is not None and 100 * change.loss > TASK_POINTS:
        failures.append(f"the task loses {100 * change.loss:.2f} points, more than {TASK_POINTS:g}")
    return Checked(
        target=edge.variant.target,
        precision=precision,
        prompts=len(cases),
        steps=len(choices),
        max_abs=float(max(gaps)),
        kl_mean=float(np.mean(divergence)),
        kl_max=float(max(divergence)),
        same_choice=float(np.mean(choices)),
        identical=identical,
        divergences=differing,
        questions=len(expected),
        accuracy=float(np.mean(right)) if right else None,
        lost=lost,
        gained=gained,
        loss=None if change is None else 100 * change.loss,
        interval=None if change is None else (100 * change.interval[0], 100 * change.interval[1]),
        failures=failures,
    )


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


def kl(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(softmax(expected) || softmax(found)) of each row, in nats."""
    p, q = (x - x.max(axis=1, keepdims=True) for x in (expected, found))
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=1)


def _divergence(edge: EdgeVLM, number: int, case: Case, found: list[int]) -> Divergence:
    step = next((i for i, (a, b) in enumerate(zip(case.said, found)) if a != b), min(len(case.said), len(found)))
    best = np.sort(case.logits[min(step, len(case.said) - 1)])[::-1]

    def piece(ids: list[int]) -> str:
        if step >= len(ids):
            return ""
        return "<EOS>" if ids[step] == EOS else edge.text.decode([ids[step]])

    return Divergence(number, case.prompt, step, piece(case.said), piece(found), float(best[0] - best[1]))


def _answers(model: Vlm, task: Sequence[tuple[NDArray[np.uint8], Any]]) -> list[str]:
    """The student's, alike lengths together."""
    order = sorted(range(len(task)), key=lambda i: longest_answer(task[i][1]))
    said: dict[int, str] = {}
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        pixels = torch.from_numpy(np.stack([task[i][0] for i in part]))
        longest = max(longest_answer(task[i][1]) for i in part)
        said |= dict(zip(part, model.generate(pixels, [task[i][1].text for i in part], max_new_tokens=longest)))
    return [said[i] for i in range(len(task))]


def _points(loss: float, interval: tuple[float, float]) -> str:
    return f"{loss:+.2f} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


def write_report(report: VlmParity, path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
