"""ExecuTorch programs of a generative student for the XNNPACK CPU backend: the picture, and a decoder of two methods.

`picture` (uint8 [1, S, S, 3]) gives the embeddings [1, P, W]; `prefill` takes them, ids (int64 [1, T]) and the caches;
`decode` takes one id [1, 1], its position (int64 [1]) and the caches. Both give logits [1, V] and the caches. Weights
are in the file once: methods share what is equal. Constant methods: `prefix`, `context_length`, `end_id`,
`contract_sha256`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import require
from pocketvlm.edge.vlm_bundle import VlmContract
from pocketvlm.export.targets.executorch import write_program
from pocketvlm.export.targets.onnx import quiet
from pocketvlm.export.token_tables import BLOCK, Int4Embedding, Int8Embedding
from pocketvlm.export.vlm.graphs import Picture, Step, checked_step, empty_caches
from pocketvlm.students.vlm.model import Vlm


class Words(nn.Module):
    """The step with its table: embeddings of ids before it, logits behind it."""

    def __init__(self, step: Step, table: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.step, self.table, self.head = step, table, head


class Prefill(nn.Module):
    def __init__(self, words: Words) -> None:
        super().__init__()
        self.words = words

    def forward(self, prefix: Tensor, ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat([prefix[0], self.words.table(ids[0])])
        hidden, *written = self.words.step(x, self.words.step.places[: x.shape[0]], *caches)
        return self.words.head(hidden), *written


class Decode(nn.Module):
    def __init__(self, words: Words) -> None:
        super().__init__()
        self.words = words

    def forward(self, ids: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        hidden, *written = self.words.step(self.words.table(ids[0]), position, *caches)
        return self.words.head(hidden), *written


class ExecuTorchWriter:
    """Writes both files; the picture's, in float32, is shared by all precisions."""

    def __init__(self, model: Vlm, contract: VlmContract) -> None:
        for module in ("executorch.exir", "torchao"):
            require(module, "executorch")
        self._model, self._contract = model, contract
        self._step = checked_step(model, products=True)
        self._stamp = {"contract_sha256": contract.digest()}

    def write(self, precision: str, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        """Both files: paths under `folder`, and notes."""
        files = {"picture": "executorch/picture-fp32.pte", "decoder": f"executorch/decoder-{precision}.pte"}
        (folder / "executorch").mkdir(parents=True, exist_ok=True)
        with quiet(), torch.no_grad():
            if not (folder / files["picture"]).exists():
                size = self._contract.image.size
                pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8)
                program = torch.export.export(Picture(self._model).eval(), (pixels,))
                write_program({"picture": program}, "fp32", self._stamp, folder / files["picture"])
            taken_over = self._decoder(precision, folder / files["decoder"])
        scheme = {"fp32": "float32", "int8": "8da8w-per-channel", "w4": "8da4w-blocks-of-32"}[precision]
        return files, {"backend": "xnnpack", "scheme": scheme, "picture": "float32", "delegation": taken_over}

    def _decoder(self, precision: str, path: Path) -> dict[str, Any] | None:
        contract = self._contract
        words = quantized(self._model, self._step, precision)
        caches = tuple(empty_caches(self._model.decoder))
        length = torch.export.Dim("length", min=2, max=contract.longest_prompt)
        kept: tuple[None, ...] = (None,) * len(caches)
        prefix = torch.zeros(1, contract.prefix, contract.width)
        programs = {
            "prefill": torch.export.export(
                Prefill(words).eval(),
                (prefix, torch.zeros(1, 5, dtype=torch.int64), *caches),
                dynamic_shapes={"prefix": None, "ids": {1: length}, "caches": kept},
            ),
            "decode": torch.export.export(
                Decode(words).eval(),
                (torch.zeros(1, 1, dtype=torch.int64), torch.full((1,), contract.prefix), *caches),
            ),
        }
        constants = self._stamp | {
            "prefix": contract.prefix,
            "context_length": contract.context_length,
            "end_id": contract.template.end,
        }
        # one partitioner for all: a separate one for dynamic layers would make a delegate of each of them
        return write_program(programs, "fp32", constants, path)


def quantized(model: Vlm, step: Step, precision: str) -> Words:
    """The decoder with its weights at this precision, as it is lowered."""
    weight = model.decoder.embed_tokens.weight.detach()
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    if precision == "fp32":
        return Words(step, model.decoder.embed_tokens, head)
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    four = precision == "w4"
    table = Int4Embedding(weight) if four and weight.shape[1] % BLOCK == 0 else Int8Embedding(weight)
    words = Words(copy.deepcopy(step), table, copy.deepcopy(head))
    four_bits: Any = torch.int4  # type: ignore[attr-defined]

    def blocks(module: nn.Module, name: str) -> bool:
        return four and isinstance(module, nn.Linear) and module.in_features % BLOCK == 0

    def channels(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not blocks(module, name)

    in_blocks = Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=PerGroup(BLOCK))
    by_channel = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(words, by_channel, channels)
    quantize_(words, in_blocks, blocks)
    return words
