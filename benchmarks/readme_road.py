"""Run every command of the README in full, as a newcomer types it, in an empty folder.

    python -m benchmarks.readme_road

The quick demo, the five lines of Python on what it made, and the blocks of the road, in the README's order. Where the
README says `pairs.jsonl`, `test.jsonl` or `my-clip`, such files are made first, from the built-in pictures and a small
random CLIP in Hugging Face's format. Only the user's own distillation is cut, to 20 of its 20,000 steps.
Written to benchmarks/results/readme.json: seconds, exit status and the last lines of each; the quick demo's own result
goes to demo-quick.json. A command that fails ends the script with an error, after the result is written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results_folder import machine, write

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
LAST_LINES = 12
# twenty thousand steps are a night on two cores, and a random teacher has nothing to say
SHORTENED = {"pocketvlm distill clip": "train.steps=20 train.warmup_steps=5"}


def blocks(language: str) -> list[str]:
    """Code blocks of the README in one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """Lines of the shell blocks that start with `pocketvlm`, and the demo behind the `&&` of the install line."""
    lines = [
        line.partition("#")[0].replace("\\", "").strip() for block in blocks("bash") for line in block.splitlines()
    ]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("pocketvlm ")]


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """Run in `folder`; what the result file keeps of it."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})
    output = [line for line in (done.stdout + done.stderr).replace(str(folder), ".").splitlines() if line.strip()]
    return {
        "seconds": round(time.perf_counter() - started, 1), "exit": done.returncode, "last": output[-LAST_LINES:]
    }  # fmt: skip


def main() -> None:
    """Walk the README."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for line in commands():
            typed = line
            for start, change in SHORTENED.items():
                typed = typed.replace(start, f"{start} {change}")
            row = run([sys.executable, "-m", "pocketvlm.cli", *shlex.split(typed)[1:]], folder)
            rows.append({"command": line} | ({"shortened": typed} if typed != line else {}) | row)
            print(f"{row['seconds']:7.1f} s  exit {row['exit']}  {line}", flush=True)
            if line.startswith("pocketvlm demo --quick"):
                # the README's table
                write("demo-quick.json", json.loads((folder / "runs" / "demo" / "demo.json").read_text("utf-8")))
                (code,) = blocks("python")
                # as on a device: without torch
                row = run([sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + code], folder)
                rows.append({"command": "the five lines of Python"} | row)
                print(f"{row['seconds']:7.1f} s  exit {row['exit']}  the five lines of Python", flush=True)
    print(write("readme.json", {"commands": rows, "machine": machine()}))
    if failed := [row["command"] for row in rows if row["exit"] != 0]:
        raise SystemExit(f"{len(failed)} of {len(rows)} commands of the README failed: {json.dumps(failed)}")


def prepare(folder: Path) -> None:
    """The files of their own that the README's readers have."""
    from pocketvlm.data.openmoji import openmoji_samples

    samples = openmoji_samples(flags="exclude")
    (folder / "pictures").mkdir()
    for name, part in (("pairs.jsonl", samples[:320]), ("test.jsonl", samples[320:400])):
        lines = []
        for place, sample in enumerate(part):
            path = folder / "pictures" / f"{name[:5]}-{place}.webp"
            path.write_bytes(sample.image.read())
            row = {"image": str(path.relative_to(folder)), "caption": sample.captions[0].text}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / name).write_text("".join(lines), encoding="utf-8")
    save_clip(folder / "my-clip")


def save_clip(folder: Path) -> None:
    """A small random CLIP as `save_pretrained` leaves it: model, image processor, tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    from pocketvlm.data.openmoji import openmoji_samples

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<start>", "<end>", "<unk>"])
    tokenizer.train_from_iterator([" ".join(row.captions[0].text for row in openmoji_samples())], trainer)
    start, end = ((name, tokenizer.token_to_id(name)) for name in ("<start>", "<end>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[start, end])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<unk>",
        padding_side="right", model_max_length=24, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": len(fast), "max_position_embeddings": 24, "bos_token_id": start[1]}
    vision = {**tower, "image_size": 64, "patch_size": 16}
    config = CLIPConfig(text_config={**text, "eos_token_id": end[1]}, vision_config=vision, projection_dim=48)
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    for part in (model, CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64), fast):
        part.save_pretrained(folder)


if __name__ == "__main__":
    main()
