"""What reading a picture and a question costs, counted: the decoder by a formula, the picture's side by torch."""

from __future__ import annotations

import itertools

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pocketvlm.students.vlm.connectors import Fusion
from pocketvlm.students.vlm.model import Vlm


def decoder_flops(model: Vlm, text: int) -> int:
    """Floating-point operations of one picture's prefill with `text` tokens, up to the first answer token.

    Matrix products alone, a multiplication and an addition each. With n = 1 + K + text tokens in a layer of K visual
    ones, width W, keys and values of width V and an MLP of H units:

        layer: 2 n W (2 W + 2 V + 3 H) + 4 n^2 W, the attention over all pairs, masked or not
        before a layer that sees fewer, m being the layer before's n:
            PyramidDrop 2 W^2 + 2 m W V + 2 m W, AIM 2 m^2 W + 10 m^2 (heads)
        logits: 2 W (vocabulary)
        pre-fusion of the question in a block, S picture tokens: 2 text W (2 W + 2 V + 3 H) + 4 text (S + text) W
    """
    config, counts = model.config.decoder, model.counts
    width, narrow = config.width, config.kv_heads * (config.width // config.heads)
    linear = 2 * width * (2 * width + 2 * narrow + 3 * config.hidden)
    lengths = [1 + count + text for count in counts]
    total = sum(n * linear + 4 * n * n * width for n in lengths)
    method = "" if model.reduction is None else model.reduction.method
    for before, after in itertools.pairwise(lengths):
        if after < before and method == "pyramid":
            total += 2 * width * width + 2 * before * width * narrow + 2 * before * width
        elif after < before and method == "aim":
            total += 2 * before * before * width + 10 * before * before * config.heads
    if isinstance(model.connector, Fusion):
        seen = model.connector.span
        total += len(model.connector.blocks) * text * (linear + 4 * (seen + text) * width)
    return total + 2 * width * model.tokenizer.vocab_size


@torch.no_grad()
def picture_flops(model: Vlm) -> int:
    """Floating-point operations from one picture's pixels to its visual tokens, as torch counts them."""
    size = model.config.vision.size
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=model.decoder.embed_tokens.weight.device)
    # fused attention on a CPU is not in torch's table
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.picture(pixels)
    return int(counter.get_total_flops())
