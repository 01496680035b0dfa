"""Where the time of a prefill goes, with all visual tokens and with a quarter of them, and what several tokens at once
cost a shipped decoder.

    python -m benchmarks.vlm_prefill

A named size with random weights and the shipped tokenizer, since time does not depend on what is learnt. Four parts:
operations for questions of every length; operators of PyTorch's prefill; the prefill of exported ONNX decoders in each
precision by turns; one call of those decoders with 1, 2, 4 and 8 tokens behind a prompt, which is what verifying a
draft of so many would cost at least (the file computes the last token's outputs alone), with what a smaller model takes
to draft. Beside them the lengths of questions and answers of the test stream. Medians over rounds, one thread,
processor time and time by the clock.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from benchmarks.results_folder import machine, write
from pocketvlm.data.scene_questions import CAPTIONS
from pocketvlm.data.scenes import PictureSet, picture_set
from pocketvlm.distill.vlm.evaluate import drawn_questions
from pocketvlm.distill.vlm.sweep import prefill_times, reduction_of
from pocketvlm.edge.vlm import EdgeVLM
from pocketvlm.export.vlm.bundle import export_vlm
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm_config, save_vlm
from pocketvlm.students.vlm.flops import decoder_flops
from pocketvlm.students.vlm.tokenizer import VlmTokenizer

RESULT = "vlm_prefill.json"
PRECISIONS = ("fp32", "int8", "w4")
AT_ONCE = (1, 2, 4, 8)
QUESTION = "What is at the top left?"
Name = TypeVar("Name")


def flops_by_text(model: Vlm, lengths: Sequence[int]) -> dict[str, float]:
    """Operations of the prefill with all tokens over those with a quarter, by the tokens of the question."""
    found = {}
    for text in lengths:
        counted = []
        for reduction in (None, reduction_of("pool", model.connector.tokens // 4)):
            model.reduce_tokens(reduction)
            counted.append(decoder_flops(model, text))
        found[str(text)] = counted[0] / counted[1]
    model.reduce_tokens(None)
    return found


@torch.no_grad()
def operators(model: Vlm, rounds: int) -> list[dict[str, float]]:
    """Shares of the time of PyTorch's prefill, with all tokens and with a quarter; tower and connector ran before."""
    ids = torch.tensor([model.prompt_ids(QUESTION)])
    size = model.config.vision.size
    seen = model.look(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    rows = []
    for reduction in (None, reduction_of("pool", model.connector.tokens // 4)):
        model.reduce_tokens(reduction)
        shown, length = model.show(seen), torch.tensor([ids.shape[1]])
        for _ in range(3):
            model.decoder.logits(model.prefill(shown, ids, length)[0])
        with profile(activities=[ProfilerActivity.CPU]) as told:
            for _ in range(rounds):
                model.decoder.logits(model.prefill(shown, ids, length)[0])
        spent = {row.key: row.self_cpu_time_total / 1e3 / rounds for row in told.key_averages()}
        products = sum(ms for name, ms in spent.items() if name in ("aten::mm", "aten::addmm", "aten::bmm"))
        attention = sum(ms for name, ms in spent.items() if "attention" in name)
        whole = sum(spent.values())
        rows.append({"tokens": model.counts[0], "products": products / whole, "attention": attention / whole})
    model.reduce_tokens(None)
    return rows


def timed(ways: dict[Name, Callable[[], object]], rounds: int) -> dict[Name, dict[str, float]]:
    """Median milliseconds of each, on processors and by the clock, and the medians of how many times it is faster than
    the first; all take turns, the first round is not counted."""
    spent: dict[Name, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            used, begun = time.process_time(), time.perf_counter()
            call()
            wall, cpu = time.perf_counter() - begun, time.process_time() - used
            if turn:
                spent[name][0].append(1e3 * cpu)
                spent[name][1].append(1e3 * wall)
    first = next(iter(spent.values()))
    found = {}
    for name, both in spent.items():
        ratio = [statistics.median(a / b for a, b in zip(*pair)) for pair in zip(first, both)]
        cpu_ms, ms = (statistics.median(values) for values in both)
        found[name] = {"cpu_ms": cpu_ms, "ms": ms, "times_faster_cpu": ratio[0], "times_faster": ratio[1]}
    return found


def decoders(model: Vlm, folder: Path, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prefills of the exported decoders with all tokens and with a quarter, and calls of several tokens."""
    ids = model.prompt_ids(QUESTION)
    opened: dict[tuple[str, int], EdgeVLM] = {}
    for reduction in (None, reduction_of("pool", model.connector.tokens // 4)):
        model.reduce_tokens(reduction)
        keep = model.counts[0]
        saved = save_vlm(model, folder / f"student-{keep}")
        bundle = export_vlm(saved, folder / f"bundle-{keep}", ["onnx"], PRECISIONS, progress=print)
        opened |= {(name, keep): EdgeVLM.load(bundle, "onnxruntime", name, 1) for name in PRECISIONS}
    model.reduce_tokens(None)
    first: list[dict[str, Any]] = []
    then: list[dict[str, Any]] = []
    for name in PRECISIONS:
        prefills: dict[int, Callable[[], object]] = {}
        steps: dict[int, Callable[[], object]] = {}
        for keep in (keep for precision, keep in opened if precision == name):
            edge = opened[name, keep]
            decoding: Any = edge.backend.begin()
            prefix = np.zeros((1, 1 + keep, edge.contract.width), np.float32)
            prefills[keep] = lambda d=decoding, x=prefix: d.prefill(x, ids)  # type: ignore[misc]
            steps = steps or {count: _several(decoding, edge.contract, len(ids), count) for count in AT_ONCE}
        first += [{"precision": name, "tokens": keep} | ms for keep, ms in timed(prefills, rounds).items()]
        then += [{"precision": name, "at_once": count} | ms for count, ms in timed(steps, rounds).items()]
    return first, then


def _several(decoding: Any, contract: Any, text: int, count: int) -> Callable[[], object]:
    """One call with `count` tokens behind the prompt, through the binding that a prefill has."""
    start = contract.prefix + text
    row = np.full((1, count), contract.template.first_text, np.int32)
    nothing = np.zeros((1, 0, contract.width), np.float32)
    bound = decoding._binding(nothing, row, np.arange(start, start + count, dtype=np.int32))
    # the arrays live as long as the binding that holds their memory
    return lambda kept=(row, nothing): decoding._session.run_with_iobinding(bound, decoding._options)  # type: ignore[misc]


def drafting(model: Vlm, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Processor time, ms, that a model takes to draft: its picture and prompt once, then each token."""
    bundle = export_vlm(
        save_vlm(model, folder / "draft"), folder / "draft-bundle", ["onnx"], PRECISIONS, progress=print
    )
    ids, size = model.prompt_ids(QUESTION), model.config.vision.size
    pixels = np.zeros((1, size, size, 3), np.uint8)
    prefix = np.zeros((1, model.prefix, model.config.decoder.width), np.float32)
    found = {}
    for name in PRECISIONS:
        edge = EdgeVLM.load(bundle, "onnxruntime", name, 1)
        decoding: Any = edge.backend.begin()
        ways: dict[str, Callable[[], object]] = {
            "picture": lambda edge=edge: edge.backend.picture(pixels),  # type: ignore[misc]
            "prefill": lambda d=decoding: d.prefill(prefix, ids),  # type: ignore[misc]
            "token": _several(decoding, edge.contract, len(ids), 1),
        }
        found[name] = {part: ms["cpu_ms"] for part, ms in timed(ways, rounds).items()}
    return found


def acceptance_needed(answer: float, begin: float, round_: float, drafted: int) -> float | None:
    """The share of drafted tokens that must be accepted, each as likely as the others, for decoding not to be slower.

    A round of `drafted` tokens of acceptance a gives 1 + a + ... + a^drafted tokens. None: not even with all of them.

    Args:
        answer: tokens after the first. begin, round_: what the draft's picture and prompt, and a round of drafting and
            verifying cost, in steps of one token.
    """
    for percent in range(101):
        given = sum((percent / 100) ** power for power in range(drafted + 1))
        if begin + answer / given * round_ <= answer:
            return percent / 100
    return None


def needed(
    steps: Sequence[dict[str, Any]], drafts: dict[str, dict[str, float]], answers: dict[str, float]
) -> list[dict[str, Any]]:
    """`acceptance_needed` for each precision, kind of question and number of drafted tokens."""
    rows = []
    for name, part in drafts.items():
        cost = {row["at_once"]: row["cpu_ms"] for row in steps if row["precision"] == name}
        begin = (part["picture"] + part["prefill"]) / cost[1]
        for kind, answer in answers.items():
            for at_once in AT_ONCE[1:]:
                round_ = ((at_once - 1) * part["token"] + cost[at_once]) / cost[1]
                least = acceptance_needed(answer - 1, begin, round_, at_once - 1)
                best = (answer - 1) / (begin + (answer - 1) / at_once * round_)
                rows.append(
                    {"precision": name, "kind": kind, "drafted": at_once - 1, "acceptance": least, "at_best": best}
                )
    return rows


def lengths(pictures: PictureSet, tokenizer: VlmTokenizer, scenes: int) -> dict[str, dict[str, float]]:
    """Mean tokens of questions and of true answers with their end, of captions and of everything else."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for _, questions in drawn_questions(pictures, scenes=scenes):
        for one in questions:
            kind = "captions" if one.type in CAPTIONS else "questions"
            found[kind].append((len(tokenizer.question(one.text)), len(tokenizer.answer(one.answer))))
    return {
        kind: {
            "n": len(rows),
            "question": statistics.mean(asked for asked, _ in rows),
            "answer": statistics.mean(said for _, said in rows),
            "longest": max(said for _, said in rows),
        }
        for kind, rows in sorted(found.items())
    }


def main(
    student: str = "vlm-29m", draft: str = "vlm-5m", rounds: int = 40, scenes: int = 1000, fold: int = 0,
    result: str = RESULT,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    tokenizer = (resources.files("pocketvlm.distill.vlm") / "kept" / "tokenizer.json").read_bytes()
    model, small = (build_vlm(load_vlm_config(name), tokenizer, load_weights=False).eval() for name in (student, draft))
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        prefills, steps = decoders(model, Path(folder), rounds)
        drafted = drafting(small, Path(folder), rounds)
    plan = [None, reduction_of("pool", model.connector.tokens // 4)]
    spoken = lengths(picture_set("test", fold), model.tokenizer, scenes)
    found = {
        "student": student,
        "weights": "random",
        "question": len(model.prompt_ids(QUESTION)),
        "rounds": rounds,
        "flops_ratio_by_question": flops_by_text(model, range(3, 31)),
        "torch_shares": operators(model, rounds // 2),
        "torch_ms": prefill_times(model, plan, rounds=rounds),
        "prefill": prefills,
        "several_tokens": steps,
        "lengths": spoken,
        "draft": {
            "student": draft,
            "cpu_ms": drafted,
            "needed": needed(steps, drafted, {kind: row["answer"] for kind, row in spoken.items()}),
        },
        "machine": before,
        "machine_after": machine(),
    }
    for name, value in found.items():
        print(name, value)
    print(write(result, found))


if __name__ == "__main__":
    tyro.cli(main)
