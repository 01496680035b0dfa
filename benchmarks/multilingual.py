"""How much of its English does the multilingual student keep in other languages, and what are its sources worth?

    python -m benchmarks.multilingual --stage all --dictionaries /usr/share/dictd --cedict cedict_ts.u8 \\
        --annotations cldr-annotations-full/annotations --stamps /usr/share/tuxpaint/stamps

Recipe `dc-clip-style` with other sources, numbers of pairs and steps. Each finished run is kept in the result file
multilingual.json under the digest of what it does and is not repeated, so the command continues where it stopped.
Stages: prepare (one pack for each fold under --work; needs the extra `demo` and the lists), run (needs the
pack and torch alone, so it may be another machine, --device cuda), summary, all.

Test concepts are withheld from everything: their pictures from student and teacher, their names and emoji keywords in
all languages from the parallel texts. "strict" arms also leave out each dictionary pair whose English side equals the
English name of a test concept (case-folded letters and digits, without a leading article or "to").
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks.ablation_runs import SILENT, _in_memory
from benchmarks.results_folder import RESULTS, machine, write_between, write_text
from pocketvlm.data import open_data
from pocketvlm.data.parallel import Pair, english_key, parallel_texts
from pocketvlm.data.source import DataSource
from pocketvlm.data.splits import FOLDS, stable_hash
from pocketvlm.distill.batches import Pictures, prefetch
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.students import build_student, inherit_tokenizer, load_config
from pocketvlm.students.build import assemble
from pocketvlm.students.languages import add_languages
from pocketvlm.teachers.device import describe_device, pick_device

NAME = "multilingual.json"
PAGE = RESULTS.parents[1] / "docs" / "multilingual.md"
RECIPE = "dc-clip-style"
FLOORS = {"mean": 80.0, "worst": 60.0}
"""Per cent of its English R@5 that the student shall keep."""
PER_LANGUAGE = (6000, 20_000)
"""Dictionary pairs in each language at most, the most frequent English first; a pack for each."""
LONG = 1200
"""Steps of stage 2, of the longest runs."""
SOURCES = {
    "names": ("captions",),
    "keywords": ("captions", "annotations"),
    "dictionaries": ("captions", "annotations", "stamps", "dictd", "cedict"),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. sources: of SOURCES. strict: see above. share: of the pairs, names apart. steps: of stage 1. align: of
    stage 2. pieces: added at most. per_language: dictionary pairs at most."""

    fold: int
    seed: int
    sources: str
    strict: bool
    share: float = 1.0
    steps: int = 500
    align: int = 10
    pieces: int = 120_000
    per_language: int = PER_LANGUAGE[0]

    @property
    def digest(self) -> str:
        recipe = recipe_of(self).model_dump(mode="json", exclude_defaults=True, exclude={"description"})
        facts = [dataclasses.asdict(self), recipe]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def jobs(folds: Sequence[int], seeds: Sequence[int]) -> Iterator[Job]:
    """Sources on all folds and seeds, then curves over steps, pairs and pieces on the first fold and seed; each as it
    starts (one step of stage 2) and as it is trained."""
    start = {"steps": 0, "align": 1}
    for seed in seeds:
        for fold in folds:
            for sources, strict in (
                ("dictionaries", True),
                ("dictionaries", False),
                ("keywords", True),
                ("names", True),
            ):
                yield Job(fold, seed, sources, strict, **start)
                yield Job(fold, seed, sources, strict)
    base = Job(folds[0], seeds[0], "dictionaries", True)
    for steps in (100, 900):
        yield dataclasses.replace(base, steps=steps)
    for fold in folds:
        for align in (100, 350):
            yield Job(fold, seeds[0], "dictionaries", True, align=align)
        for seed in seeds:
            yield Job(fold, seed, "dictionaries", True, align=LONG)
        yield Job(fold, seeds[0], "names", True, align=LONG)
    yield dataclasses.replace(base, steps=1500, align=350)
    changes: tuple[dict[str, Any], ...] = (
        {"share": 0.1}, {"share": 0.3}, {"pieces": 20_000}, {"pieces": 60_000}, {"per_language": PER_LANGUAGE[1]},
    )  # fmt: skip
    for change in changes:
        for length in (start, {}, {"align": LONG}):
            yield dataclasses.replace(base, **{**length, **change})


def recipe_of(job: Job) -> Recipe:
    """The shipped recipe at this job's fold, seed and steps; its parallel sources are given by the pack."""
    changes = [
        f"data.train=openmoji?pool=student&fold={job.fold}&language=all&flags=exclude",
        f"data.eval=openmoji?pool=test&fold={job.fold}&language=all&flags=exclude",
        f"data.parallel.sources={json.dumps(name_sources(job.fold))}",
        f"teacher.spec=openmoji-lit?fold={job.fold}",
        f"tokenizer.added_pieces={job.pieces}", f"train.seed={job.seed}",
        f"train.text_pretrain_steps={job.steps}", f"train.steps={job.align}",
        f"train.warmup_steps={min(10, job.align)}", "train.precision=fp32",
    ]  # fmt: skip
    return load_recipe(RECIPE, changes)


def name_sources(fold: int) -> list[str]:
    return [f"captions:openmoji?pool={pool}&fold={fold}&language=all" for pool in ("student", "teacher")]


# --- what the runs of a fold share


def pack_path(work: Path, fold: int, per_language: int) -> Path:
    return work / f"multilingual-f{fold}-{per_language}.pt"


def make_pack(work: Path, fold: int, per_language: int, lists: Sequence[str]) -> None:
    """Everything that the runs of a fold and number of pairs read, in one file."""
    path, began = pack_path(work, fold, per_language), time.monotonic()
    if path.is_file():
        return
    job = Job(fold, 0, "dictionaries", False)
    sources = [*name_sources(fold), *(text.replace("{fold}", str(fold)) for text in lists)]
    recipe = recipe_of(job)
    assert recipe.data.eval is not None, "the recipe has evaluation data"
    asked = open_data(recipe.data.eval)
    tags = sorted({caption.language for sample in asked for caption in sample.captions})
    withheld = asked.captions()
    pairs = parallel_texts(sources, languages=tags, per_language=per_language, withheld=withheld, strict=False)
    table = path.with_suffix(".tsv")
    table.write_text("".join(f"{p.text}\t{p.english}\t{p.language}\n" for p in pairs), encoding="utf-8")
    # read once, and the teacher of the pack has read the English of all arms
    changes = [f"data.parallel.sources=['table:{table}']", "data.parallel.strict=false"]
    recipe = recipe.updated([*changes, "data.parallel.per_language=null"])
    found = prepare(recipe, SILENT)
    assert found.images is not None, "the recipe has a teacher"
    assert found.words is not None, "the recipe has a teacher and texts"
    assert found.questions is not None, "the recipe has evaluation data"
    config = load_config(recipe.student.name, recipe.student.overrides)
    start = build_student(
        config,
        embed_dim=found.student.embed_dim,
        tokenizer_json=inherit_tokenizer(found.english, config.text.vocab_size),
        seed=0,
        space_id=found.student.space_id,
    )
    samples = [_in_memory(sample) for sample in found.samples]
    packed = dataclasses.replace(
        found,
        recipe=recipe_of(job),
        source=DataSource(found.source.name, samples),
        held_out=None,
        samples=samples,
        questions=dataclasses.replace(found.questions, samples=tuple(map(_in_memory, found.questions.samples))),
        images=None,
        words=None,
        teacher_answers=None,
        student=None,  # type: ignore[arg-type]
        pictures=None,  # type: ignore[arg-type]
        report=None,  # type: ignore[arg-type]
        memo={},
    )
    denied = sorted({english_key(text) for text in withheld})
    uids, english = [sample.uid for sample in samples], sorted({*found.english, *found.read(found.source.captions())})
    content = {
        "prepared": packed,
        "policy": found.pictures.policy,
        "pairs": [dataclasses.astuple(pair) for pair in pairs],
        "denied": denied,
        "tokenizer": start.tokenizer_json,
        "start": {name: value.half() for name, value in start.state_dict().items()},
        "config": config,
        "info": dataclasses.replace(found.images.info, feature_dim=0, text_feature_dim=0),
        "uids": uids,
        "images": torch.stack([found.images.image(uids, view) for view in range(recipe.views.count)], dim=1).half(),
        "english": english,
        "embeddings": _narrow(found.words.text(english)),
    }
    torch.save(content, part := path.with_suffix(".part"))
    part.replace(path)
    print(f"{path.name}: {len(pairs)} pairs, {time.monotonic() - began:.0f} s", flush=True)


def _narrow(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as int8 and their scales: a quarter of the file, and a cosine of 0.9999 with the rows."""
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / scale).round().to(torch.int8), scale.half()


class Stored:
    """The teacher's outputs of a pack, as `TeacherCache` gives them, without features."""

    def __init__(self, content: dict[str, Any], info: Any) -> None:
        narrow, scale = content["embeddings"]
        self.info = info
        self._row = {text: row for row, text in enumerate(content["english"])}
        self._texts = torch.nn.functional.normalize(narrow.float() * scale.float(), dim=-1)
        self._picture = {uid: row for row, uid in enumerate(content["uids"])}
        self._images = content["images"].float()

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        return self._texts[[self._row[text] for text in texts]]

    def image(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> torch.Tensor:
        places = [self._picture[uid] for uid in uids]
        return self._images[places, [views] * len(places) if isinstance(views, int) else list(views)]


def chosen(pairs: Sequence[Pair], denied: set[str], job: Job) -> list[Pair]:
    """The pairs that a job learns from."""
    kept = [pair for pair in pairs if pair.source in SOURCES[job.sources]]
    if job.strict:
        kept = [pair for pair in kept if english_key(pair.english) not in denied]
    return [
        pair
        for pair in kept
        if pair.source == "captions" or stable_hash(f"{pair.language}/{pair.text}/{pair.english}") < job.share * 2.0**64
    ]


# --- one run

_OPEN: dict[Path, dict[str, Any]] = {}


def run(job: Job, work: Path, device: str) -> dict[str, Any]:
    """Train and score; the row that is kept."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    if (path := pack_path(work, job.fold, job.per_language)) not in _OPEN:
        _OPEN.clear()
        # the file is this benchmark's own, written by `make_pack`
        _OPEN[path] = torch.load(path, weights_only=False)
    content = _OPEN[path]
    found: Prepared = content["prepared"]
    assert found.teacher is not None, "the recipe has a teacher"
    pairs = chosen([Pair(*row) for row in content["pairs"]], set(content["denied"]), job)
    recipe = recipe_of(job)
    start = assemble(
        content["config"], found.teacher.dim, content["tokenizer"], seed=0, space_id=found.teacher.space_id,
        load_weights=False,
    )  # fmt: skip
    start.load_state_dict({name: value.to(start.state_dict()[name]) for name, value in content["start"].items()})
    student = add_languages(start, [(p.text, p.english) for p in pairs], job.pieces)
    stored: Any = Stored(content, content["info"])
    own = [text for text, english in zip(found.texts, found.english) if text == english]
    # the pack has the teacher's answers for texts that fit the context alone
    fitting = set(zip(found.texts, found.english))
    learnt = [pair for p in pairs if (pair := (p.text, p.english)) in fitting]
    both = list(dict.fromkeys([*learnt, *((text, text) for text in own)]))
    pictures = Pictures(
        found.samples, student.image_spec, policy=content["policy"], seed=recipe.views.seed,
        source_px=recipe.data.source_px,
    )  # fmt: skip
    prepared = dataclasses.replace(
        found,
        recipe=recipe,
        texts=[text for text, _ in both],
        english=[english for _, english in both],
        tokenizer=Tokenizer(student.tokenizer_json, student.text_spec),
        student=student,
        images=stored,
        words=stored,
        pictures=pictures,
        report=SILENT,
        memo={},
    )
    target = pick_device(device)
    trainer = Trainer(prepared, target)
    trainer.start()
    ready = time.perf_counter()
    for batch in prefetch(trainer.feed.make, range(trainer.total)):
        trainer.one_step(batch)
    trained = time.perf_counter()
    with trainer.averaged():
        evaluation = trainer.evaluate()
    assert evaluation is not None, "the recipe has evaluation data"
    ranks, tags = evaluation.queries["model/languages/rank"], evaluation.queries["languages/language"].tolist()
    return {
        **dataclasses.asdict(job),
        "digest": job.digest,
        "pairs": len(pairs),
        "vocabulary": student.text_spec.vocab_size,
        "text_parameters": sum(p.numel() for p in student.text_tower.parameters()),
        "queries": len(ranks),
        "recall": {tag: round(100 * float((ranks[:, i] <= 5).mean()), 2) for i, tag in enumerate(tags)},
        "final_loss": trainer.last.get("loss"),
        "seconds": {
            "prepare": round(ready - began, 1), "train": round(trained - ready, 1),
            "evaluate": round(time.perf_counter() - trained, 1),
        },
        "device": describe_device(target),
    }  # fmt: skip


# --- results


def kept_of_english(recall: dict[str, float]) -> dict[str, Any]:
    """English R@5, mean and worst of the other languages, and both as per cent of the English."""
    english, others = recall["en"], {tag: value for tag, value in recall.items() if tag != "en"}
    worst = min(others, key=lambda tag: others[tag])
    mean = sum(others.values()) / len(others)
    return {
        "english": round(english, 2), "mean": round(mean, 2), "mean_kept": round(100 * mean / english, 1),
        "worst": worst, "worst_recall": round(others[worst], 2), "worst_kept": round(100 * others[worst] / english, 1),
    }  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seeds of one run pooled, fold by fold: settings were chosen on fold 0, the others are asked afterwards. Then what
    was run on all folds pooled over them by their first seed ("fold" is "all")."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    what = ("fold", "sources", "strict", "share", "steps", "align", "pieces", "per_language")
    for row in runs:
        groups.setdefault(tuple(row[key] for key in what), []).append(row)
    for setting in dict.fromkeys(key[1:] for key in groups):
        folds = [groups.get((fold, *setting), []) for fold in range(FOLDS)]
        # seeds that all folds have, so that no fold weighs more than another
        common = set.intersection(*({row["seed"] for row in rows} for rows in folds))
        if common:
            groups["all", *setting] = [row for rows in folds for row in rows if row["seed"] in common]
    found = []
    for key, rows in groups.items():
        recall = {tag: float(np.mean([row["recall"][tag] for row in rows])) for tag in rows[0]["recall"]}
        kept = kept_of_english(recall)
        met = {part: kept[f"{part}_kept"] >= floor for part, floor in FLOORS.items()}
        found.append(
            dict(zip(what, key))
            | {"seeds": sorted({row["seed"] for row in rows})}
            | {"pairs": round(float(np.mean([r["pairs"] for r in rows]))), **kept, "floors_met": met}
            | {"recall": {tag: round(value, 2) for tag, value in recall.items()}}
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as the page shows it."""
    lines = [
        "| fold | sources | pairs | pieces | steps | seeds | English R@5 | mean of 13 | kept | worst | kept |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    order = ("fold", "steps", "align", "pairs", "pieces")
    for row in sorted(
        rows,
        key=lambda r: (list(SOURCES).index(r["sources"]), not r["strict"], str(r["fold"]), *(r[k] for k in order[1:])),
    ):
        dictionary = {True: ", strict", False: ", as they come"}[row["strict"]]
        what = (
            f"{row['sources']}{dictionary} | {row['pairs']:,} | {row['pieces']:,} | {row['steps']:,} + {row['align']:,}"
        )
        lines.append(
            f"| {row['fold']} | {what} | {len(row['seeds'])} | {row['english']:.1f} | {row['mean']:.1f} | "
            f"{row['mean_kept']:.0f} % | {row['worst']} {row['worst_recall']:.1f} | {row['worst_kept']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def load(path: Path) -> dict[str, Any]:
    if path.is_file():
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return value
    return {"recipe": RECIPE, "floors": FLOORS, "summary": [], "runs": []}


def keep(path: Path, row: dict[str, Any] | None) -> None:
    value = load(path)
    if row is not None:
        value["runs"] = [*(old for old in value["runs"] if old["digest"] != row["digest"]), row]
        value["machines"] = value.get("machines", {}) | {row["device"]: machine()}
    value["summary"] = summary(value["runs"])
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main(
    stage: Literal["prepare", "run", "summary", "all"] = "all",
    folds: tuple[int, ...] = (0,),
    seeds: tuple[int, ...] = (0, 1, 2),
    dictionaries: Path | None = None,
    cedict: Path | None = None,
    annotations: Path | None = None,
    stamps: Path | None = None,
    device: str = "auto",
    processes: int = 1,
    limit_seconds: float = float("inf"),
    work: Path = Path("runs/multilingual"),
    out: Path = RESULTS,
) -> None:
    """Run what is missing of a stage."""
    began, work = time.monotonic(), work.resolve()
    os.environ["OMP_NUM_THREADS"] = "1"
    lists = [f"dictd:{dictionaries.resolve()}"] if dictionaries else []
    lists += [f"cedict:{cedict.resolve()}"] if cedict else []
    lists += [f"stamps:{stamps.resolve()}"] if stamps else []
    if annotations:
        lists += [
            f"annotations:{annotations.resolve()}?openmoji?pool={pool}&fold={{fold}}" for pool in ("student", "teacher")
        ]
    if stage in ("prepare", "all"):
        work.mkdir(parents=True, exist_ok=True)
        for fold in folds:
            # further pairs are asked for on the first fold alone
            for per_language in PER_LANGUAGE if fold == folds[0] else PER_LANGUAGE[:1]:
                make_pack(work, fold, per_language, lists)
    if stage in ("run", "all"):
        done = {row["digest"] for row in load(out / NAME)["runs"]}
        waiting = [job for job in jobs(folds, seeds) if job.digest not in done]
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(_in_time, job, work, device, began + limit_seconds) for job in waiting]
            for future in as_completed(futures):
                if (row := future.result()) is not None:
                    keep(out / NAME, row)
                    print(_told(row), flush=True)
    if stage in ("summary", "all"):
        keep(out / NAME, None)
        write_between(PAGE, "multilingual", table(load(out / NAME)["summary"]))


def _in_time(job: Job, work: Path, device: str, deadline: float) -> dict[str, Any] | None:
    # CLOCK_MONOTONIC is one for all processes of a machine
    return run(job, work, device) if time.monotonic() < deadline else None


def _told(row: dict[str, Any]) -> str:
    kept = kept_of_english(row["recall"])
    what = f"{row['sources']}{' strict' if row['strict'] else ''} f{row['fold']} s{row['seed']} x{row['share']}"
    return f"{what} {row['steps']}+{row['align']} steps, {row['pairs']} pairs: {kept} {row['seconds']}"


if __name__ == "__main__":
    tyro.cli(main)
