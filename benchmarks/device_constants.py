"""What one core of this machine does when it trains, for `pocketvlm plan --device cpu` (distill/devices.json, "cpu").

    python -m benchmarks.device_constants

Effective FLOP/s, two for each multiply-accumulate, of forward and backward in float32, batch 32: convolutions as the
image tower of `mnv4-050` at 128 px has them (depthwise ones among them), and matrix products as a text tower of four
layers of width 256 has them, over 32 pieces. Pictures a second: a JPEG of 256 x 256 pixels, quality 90, decoded,
augmented and resized to 128. CPU time of one thread, so that what else runs counts little. The result is
benchmarks/results/device_constants.json; a test holds that the committed table has its numbers. Half a minute.
"""

from __future__ import annotations

import torch

from benchmarks.results_folder import machine, write
from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.distill.batches import Pictures
from pocketvlm.distill.counting import count, timing
from pocketvlm.distill.stand_in import made_up_pictures
from pocketvlm.students import build_student, train_tokenizer

BATCH, PIECES, ROUNDS = 32, 32, 5
OVERRIDES = {"image.size": 128, "text.layers": 4, "text.width": 256, "text.context_length": PIECES}


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["a made-up text", "and another one"], 64)
    student = build_student("mnv4-050", embed_dim=384, tokenizer_json=tokenizer, overrides=OVERRIDES)
    size = student.image_spec.size
    pixels = torch.randint(0, 256, (BATCH, size, size, 3), dtype=torch.uint8)
    ids = torch.randint(1, student.text_spec.vocab_size, (BATCH, PIECES), dtype=torch.int32)
    jobs = {
        "convolution_flops": lambda: student.encode_image(pixels).embedding.square().mean().backward(),
        "matrix_flops": lambda: student.encode_text(ids).embedding.square().mean().backward(),
    }
    found: dict[str, float] = {}
    for name, job in jobs.items():
        found[name] = 2 * count(job).macs / timing(job, ROUNDS).cpu_s
    source = made_up_pictures(BATCH, captioned=0.0, size=256)
    pictures = Pictures(source.samples, student.image_spec, policy=AugmentPolicy(), seed=0, budget=0)
    views = timing(lambda: pictures.batch(range(BATCH), [1] * BATCH), ROUNDS)
    found["decode_per_core"] = BATCH / views.cpu_s
    result = {
        "command": "python -m benchmarks.device_constants", "machine": machine(), "batch": BATCH,
        "constants": {name: float(f"{value:.3g}") for name, value in found.items()},
    }  # fmt: skip
    write("device_constants.json", result)
    print(result["constants"])


if __name__ == "__main__":
    main()
