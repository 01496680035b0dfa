"""Fewer visual tokens of the talking teacher: the training-free methods, and the teacher trained on for nested pooling.

    python -m benchmarks.visual_tokens --stage free --pool teacher --model runs/talking-teacher
    python -m benchmarks.visual_tokens --stage free --pool test --model runs/talking-teacher
    python -m benchmarks.visual_tokens --stage train --model runs/talking-teacher --nested runs/nested
    python -m benchmarks.visual_tokens --stage nested --pool teacher --model runs/talking-teacher --nested runs/nested
    python -m benchmarks.visual_tokens --stage nested --pool test --model runs/talking-teacher --nested runs/nested
    python -m benchmarks.visual_tokens --stage speed --model runs/talking-teacher
    python -m benchmarks.visual_tokens --stage report

free measures the teacher as it is with every setting that it can do, on scenes of the teacher pool, by which settings
are chosen, or of the test pool, whose pictures are of other concepts. train makes its copy whose tokens are pooled to
9 or left 36, drawn anew in each step (M3's idea), and trains connector and decoder on scenes of the teacher pool; the
vision trunk stands still. nested measures that one beside the teacher. speed times the prefill of the teacher, in torch
and, decoder alone, in ONNX Runtime, and of a size with 576 visual tokens with random weights, as time does not depend
on what is learnt.

One thread; each stage adds its part to benchmarks/results/visual_tokens.json. report draws
docs/images/visual-tokens.png and prints the tables.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks.results_folder import RESULTS, machine, write
from pocketvlm.data.scenes import SceneTable, picture_set
from pocketvlm.distill.vlm.batches import Composer, SceneStream, batches
from pocketvlm.distill.vlm.evaluate import Asked, answer_scenes, see_scenes
from pocketvlm.distill.vlm.sweep import Point, applicable, prefill_times, reduction_of, retained, sweep
from pocketvlm.distill.vlm.sweep_report import plot
from pocketvlm.distill.vlm.train import VlmTraining, train_vlm
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm, load_vlm_config, save_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import Reduction
from pocketvlm.students.vlm.flops import decoder_flops, picture_flops
from pocketvlm.students.vlm.model import Shown

RESULT, IMAGE = "visual_tokens.json", Path(__file__).resolve().parents[1] / "docs" / "images" / "visual-tokens.png"
DRAWN, FOLD, ROW_LENGTH = (9, 36), 0, 123
LARGE = "vlm-160m"
# a quarter of the tokens on average, all of them in the first layer
EARLY = (36, 4, 4, 4, 3, 3)


def train(source: Path, out: Path, training: VlmTraining, batch: int) -> dict[str, Any]:
    """The model of `source` as one of nested pooling, trained on and saved in `out`."""
    teacher = load_vlm(source)
    config = teacher.config.model_copy(update={"connector": "nested", "connector_drawn": DRAWN})
    model = build_vlm(config, teacher.tokenizer.json, load_weights=False)
    model.load_state_dict(teacher.state_dict())
    pictures = picture_set("teacher", FOLD)
    composer = Composer(SceneTable.build(pictures, config.vision.size), torch.device("cpu"))
    stream = SceneStream(
        pictures, model.tokenizer.json, batch=batch, questions=8, length=ROW_LENGTH, variants=1, seed=11
    )
    torch.manual_seed(0)
    begun, spent = time.monotonic(), time.process_time()
    history = train_vlm(
        model,
        batches(stream, 0, torch.device("cpu")),
        composer,
        training,
        lambda row: print(json.dumps(row | {"cpu_seconds": round(time.process_time() - spent)}), flush=True),
    )
    model.reduce_tokens(Reduction(method="connector", keep=9))
    save_vlm(model, out, dtype=torch.bfloat16, overwrite=True)
    found = {
        "drawn": DRAWN,
        "batch": batch,
        "training": dataclasses.asdict(training),
        "steps": history[-1]["step"] if history else 0,
        "seconds": round(time.monotonic() - begun),
        "cpu_seconds": round(time.process_time() - spent),
        "history": history,
    }
    (out / "training.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def measure_free(source: Path, pool: str, scenes: int, rounds: int) -> dict[str, Any]:
    """The teacher with every setting, and with the rotary positions renumbered for the best known ones."""
    model = load_vlm(source)
    settings = [(name, reduction_of(name, number)) for name, numbers in applicable(model).items() for number in numbers]
    settings += [(f"{name}, renumbered", reduction_of(name, 9, "renumbered")) for name in ("pool", "distinct")]
    early = Reduction(method="pyramid", keep=3, schedule=EARLY)
    settings.append(("pyramiddrop, early", early))
    points = sweep(
        model, picture_set(pool, FOLD), settings=settings, scenes=scenes, rounds=rounds,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    return {"scenes": scenes, "machine": machine(), "points": [point.to_dict() for point in points]}


def measure_nested(source: Path, nested: Path, pool: str, scenes: int) -> dict[str, Any]:
    """The model trained on, at each of its sizes, beside the teacher with all its tokens."""
    pictures = picture_set(pool, FOLD)
    teacher, model = load_vlm(source), load_vlm(nested)
    seen = see_scenes(teacher, pictures, SceneTable.build(pictures, teacher.config.vision.size), scenes=scenes)
    rows: list[dict[str, Any]] = []
    whole: list[Asked] = []
    for one, number in [
        (teacher, teacher.connector.tokens),
        *((model, size) for size in (9, 36, 4)),
    ]:
        if one is model:
            one.reduce_tokens(Reduction(method="connector", keep=number))
        _, asked = answer_scenes(one, pictures, None, scenes=scenes, batch=64, seen=seen, captions=False)
        whole = whole or asked
        kept, interval = retained(asked, whole)
        accuracy = sum(row.right for row in asked) / len(asked)
        name = "nested" if one is model else "teacher"
        rows.append({"name": name, "keep": number, "accuracy": accuracy, "kept": kept, "interval": interval})
        print(rows[-1], flush=True)
    training = json.loads((nested / "training.json").read_text(encoding="utf-8"))
    return {"scenes": scenes, "machine": machine(), "questions": len(whole), "training": training, "points": rows}


class _Prefill(nn.Module):
    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, places: Tensor, ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last, keys, values = self.model.prefill(Shown(tokens, places, None), ids, length)
        return self.model.decoder.logits(last), keys, values


def _onnx_times(model: Vlm, reductions: Sequence[Reduction | None], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of the decoder's prefill in ONNX Runtime: medians by the clock and of processor time."""
    import onnxruntime

    ids = torch.tensor([model.prompt_ids("What is at the top left?")])
    pixels = torch.zeros(1, model.config.vision.size, model.config.vision.size, 3, dtype=torch.uint8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    made = []
    for reduction in reductions:
        model.reduce_tokens(reduction)
        with torch.no_grad():
            shown = model.show(model.look(pixels))
        given = (shown.tokens, shown.places.contiguous(), ids, torch.tensor([ids.shape[1]]))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prefill.onnx"
            torch.onnx.export(_Prefill(model).eval(), given, str(path), dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(str(path), options)
        names = [entry.name for entry in session.get_inputs()]
        made.append((session, dict(zip(names, (value.numpy() for value in given)))))
    spent: list[tuple[list[float], list[float]]] = [([], []) for _ in made]
    for turn in range(rounds + 1):
        for (session, feed), (wall, cpu) in zip(made, spent):
            begun, used = time.perf_counter(), time.process_time()
            session.run(None, feed)
            if turn:
                wall.append(time.perf_counter() - begun)
                cpu.append(time.process_time() - used)
    model.reduce_tokens(None)
    return [
        {"decoder": 1000 * statistics.median(wall), "decoder_cpu": 1000 * statistics.median(cpu)} for wall, cpu in spent
    ]


def measure_speed(source: Path, rounds: int) -> dict[str, Any]:
    """Prefill with all tokens and with a quarter of them: the teacher, and `LARGE` with random weights."""
    texts = ["What is at the top left?", "a small dolphin"]
    large = build_vlm(load_vlm_config(LARGE), train_vlm_tokenizer(texts, 400)).eval()
    rows = []
    for model, many in ((load_vlm(source), rounds), (large, max(rounds // 4, 2))):
        quarter = reduction_of("pool", model.connector.tokens // 4)
        plan: list[Reduction | None] = [None, quarter]
        times = prefill_times(model, plan, rounds=many)
        again = _onnx_times(model, plan, many) if model is not large else [{}, {}]
        for reduction, ms, onnx in zip(plan, times, again):
            model.reduce_tokens(reduction)
            text = len(model.prompt_ids("What is at the top left?"))
            decoder = decoder_flops(model, text)
            rows.append(
                {
                    "model": model.config.name, "tokens": model.counts[0], "text": text, "ms": ms, "onnx_ms": onnx,
                    "flops": {"decoder": decoder, "whole": decoder + picture_flops(model)}, "rounds": many,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return {"machine": machine(), "threads": torch.get_num_threads(), "rows": rows}


def report() -> None:
    """The picture and the tables of what the stages have left so far; of the test pool where there is one."""
    found = json.loads((RESULTS / RESULT).read_text(encoding="utf-8"))
    pools = [pool for pool in ("teacher", "test") if f"free-{pool}" in found]
    measured = {pool: [_point(row) for row in found[f"free-{pool}"]["points"]] for pool in pools}
    points = measured[pools[-1]]
    first = points[0]
    shown = [point for point in points if "renumbered" not in point.name]
    alike = {point.keep: point for point in points if point.name in ("pool", "all tokens")}
    for row in found.get(f"nested-{pools[-1]}", {"points": []})["points"][1:]:
        if row["keep"] in alike:
            changed = {"accuracy": row["accuracy"], "kept": row["kept"], "interval": tuple(row["interval"])}
            shown.append(dataclasses.replace(alike[row["keep"]], name="pool, trained on", **changed))
    plot(shown, [IMAGE], f"vlm-29m, {found[f'free-{pools[-1]}']['scenes']} scenes of the {pools[-1]} pool")
    print("| method | kept | a layer | " + " | ".join(f"{pool} pool | of all tokens'" for pool in pools), end="")
    print(" | FLOPs | decoder | with picture |\n|---|" + "---:|" * (5 + 2 * len(pools)))
    for place, point in enumerate(points):
        cells = [point.name, str(point.keep), f"{point.mean_tokens:.1f}"]
        for one in (measured[pool][place] for pool in pools):
            low, high = one.interval
            cells += [f"{100 * one.accuracy:.1f}", f"{100 * one.kept:.0f} ({100 * low:.0f}–{100 * high:.0f})"]
        cells.append(f"{first.flops['decoder'] / point.flops['decoder']:.2f}x less")
        times = measured[pools[0]]
        cells += [f"{times[0].ms[key] / times[place].ms[key]:.2f}x" for key in ("decoder_cpu", "whole_cpu")]
        print("| " + " | ".join(cells) + " |")
    for name, part in found.items():
        if not name.startswith("free"):
            for row in part.get("rows", part.get("points", [])):
                print(name, row)


def _point(row: dict[str, Any]) -> Point:
    own = {field.name: row[field.name] for field in dataclasses.fields(Point)}
    return Point(**(own | {"tokens": tuple(row["tokens"]), "interval": tuple(row["interval"])}))


def main(
    stage: Literal["free", "train", "nested", "speed", "report"],
    pool: Literal["teacher", "test"] = "test",
    model: Annotated[Path, tyro.conf.arg(help="Folder of the talking teacher.")] = Path("runs/talking-teacher"),
    nested: Annotated[Path, tyro.conf.arg(help="Folder of the model that train makes.")] = Path("runs/nested"),
    scenes: int = 100,
    rounds: int = 15,
    minutes: Annotated[float, tyro.conf.arg(help="Of training, by the clock.")] = 20.0,
    steps: Annotated[int, tyro.conf.arg(help="Of training at most.")] = 1000,
    batch: int = 8,
    rate: float = 3e-4,
) -> None:
    torch.set_num_threads(1)
    if stage == "report":
        report()
        return
    if stage == "train":
        train(
            model,
            nested,
            VlmTraining(steps=steps, seconds=60 * minutes, rate=rate, warmup=10, bfloat16=True, log_every=10),
            batch,
        )
        return
    if stage == "free":
        part = {f"free-{pool}": measure_free(model, pool, scenes, rounds)}
    elif stage == "nested":
        part = {f"nested-{pool}": measure_nested(model, nested, pool, scenes)}
    else:
        part = {"speed": measure_speed(model, rounds)}
    # read late, because another stage may have written meanwhile
    before = json.loads((RESULTS / RESULT).read_text(encoding="utf-8")) if (RESULTS / RESULT).is_file() else {}
    write(RESULT, before | part)


if __name__ == "__main__":
    tyro.cli(main)
