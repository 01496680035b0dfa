"""One way to write an answer, in a process of its own, timed whenever the parent asks (`benchmarks.vlm_decode`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.export.workers import Answer, serve

# text tokens of the prompt; the questions of scenes have four to sixteen
PROMPT = 10
# prompt -> what puts it and the picture into a cache; that gives what takes a token on, which gives the next one
Start = Callable[[np.ndarray, list[int]], tuple[int, Callable[[int], int]]]


def start(request: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """request: kind ("edge", "transformers", "student"), and bundle, backend, precision, threads or model, threads."""
    before = memory("VmRSS")
    began = time.perf_counter()
    kinds = {"edge": edge, "transformers": transformers, "student": student}
    opened, size, first_text = kinds[request["kind"]](request)
    loaded = (time.perf_counter() - began) * 1e3
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    ids = [first_text + 256 + number for number in range(PROMPT)]

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        first, each, processor = [], [], []
        for _ in range(asked["answers"]):
            began = time.perf_counter()
            token, following = opened(pixels, ids)
            first.append((time.perf_counter() - began) * 1e3)
            for _ in range(asked["tokens"]):
                began, spent = time.perf_counter(), time.process_time()
                token = following(token)
                each.append((time.perf_counter() - began) * 1e3)
                processor.append((time.process_time() - spent) * 1e3)
        return {
            "first_ms": first,
            "token_ms": each,
            "token_processor_ms": processor,
            "peak_mb": memory("VmHWM"),
            "before_mb": before,
        }

    return {"load_ms": loaded}, answer


def edge(request: dict[str, Any]) -> tuple[Start, int, int]:
    from pocketvlm.edge.vlm import EdgeVLM

    model = EdgeVLM.load(request["bundle"], request["backend"], request["precision"], request["threads"], verify=False)

    def opened(pixels: np.ndarray, ids: list[int]) -> tuple[int, Callable[[int], int]]:
        decoding, logits = model.prefill(pixels[0], ids)
        place = model.contract.prefix + len(ids)

        def following(token: int) -> int:
            nonlocal place
            found = int(decoding.decode(token, place).argmax())
            place += 1
            return found

        return int(logits.argmax()), following

    return opened, model.contract.image.size, model.contract.template.first_text


def transformers(request: dict[str, Any]) -> tuple[Start, int, int]:
    """transformers' Llama on the student's weights, eager, with its cache; the student's own vision tower."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from pocketvlm.students.vlm import load_vlm
    from pocketvlm.students.vlm.tokenizer import SPECIAL

    torch.set_num_threads(request["threads"])
    torch.set_grad_enabled(False)
    ours = load_vlm(request["model"])
    config = ours.config.decoder
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ours.tokenizer.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            max_position_embeddings=config.context_length,
        )
    ).eval()
    llama.model.load_state_dict(ours.decoder.state_dict())
    del ours.decoder.layers

    def opened(pixels: np.ndarray, ids: list[int]) -> tuple[int, Callable[[int], int]]:
        cache = DynamicCache(config=llama.config)
        words = llama.model.embed_tokens(torch.tensor([ids]))
        x = torch.cat([ours.picture(torch.from_numpy(pixels)), words], dim=1)
        found = llama(inputs_embeds=x, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def following(token: int) -> int:
            found = llama(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            return int(found.logits[0, -1].argmax())

        return int(found.logits[0, -1].argmax()), following

    return opened, ours.config.vision.size, len(SPECIAL)


def student(request: dict[str, Any]) -> tuple[Start, int, int]:
    """The student itself, eager, with its own static cache."""
    import torch

    from pocketvlm.students.vlm import load_vlm
    from pocketvlm.students.vlm.tokenizer import SPECIAL

    torch.set_num_threads(request["threads"])
    torch.set_grad_enabled(False)
    ours = load_vlm(request["model"])
    decoder = ours.decoder

    def opened(pixels: np.ndarray, ids: list[int]) -> tuple[int, Callable[[int], int]]:
        words = decoder.embed_tokens(torch.tensor([ids]))
        x = torch.cat([ours.picture(torch.from_numpy(pixels)), words], dim=1)
        place = x.shape[1]
        hidden, *cache = decoder.step(x, torch.arange(place)[None], *decoder.empty_cache(1), ours.prefix - 1)

        def following(token: int) -> int:
            nonlocal place, cache
            x = decoder.embed_tokens(torch.tensor([[token]]))
            hidden, *cache = decoder.step(x, torch.tensor([[place]]), *cache)
            place += 1
            return int(decoder.logits(hidden[0, -1]).argmax())

        return int(decoder.logits(hidden[0, -1]).argmax()), following

    return opened, ours.config.vision.size, len(SPECIAL)


def memory(field: str) -> float:
    """Megabytes of this process by /proc/self/status; not `ru_maxrss`, which a child inherits."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) / 1e3
    raise ValueError(field)


if __name__ == "__main__":
    serve(start)
