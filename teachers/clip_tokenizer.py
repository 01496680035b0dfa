"""open_clip's CLIP tokenizer as a `tokenizer.json`, so that it travels to runtimes without torch, ftfy and regex.

open_clip's `SimpleTokenizer` cleans a string in Python (ftfy, HTML unescaping, whitespace, lower case), splits it
with a regular expression and applies byte-pair merges. Splitting and merging are expressed exactly; the cleaning
is expressed as normalizer steps, which cover all of it except the cases listed in `KNOWN_DIFFERENCES`.
"""

from __future__ import annotations

import gzip
import json
import string
from pathlib import Path

from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import UsageError, require, unknown_name

KNOWN_DIFFERENCES = (
    "mojibake ('Ã©' for 'é', or C1 control characters) is repaired by ftfy and left as it is here",
    "HTML entities other than &amp; &lt; &gt; &quot; &apos; &#39; and &nbsp; are kept as written, "
    "and entities without their semicolon are not unescaped",
    "ANSI terminal escapes are removed by ftfy and lose only their control character here",
    "a special token written inside a longer run of punctuation ('<<end_of_text>') is recognised here "
    "and split as punctuation there",
    "letters and combining marks newer than the Unicode version of the tokenizers package count as punctuation",
    "texts past the context are always cut at the end (open_clip's optional random reduction is not reproduced)",
)

_CLEAN = ("lower", "whitespace", "canonicalize")
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPLIT_ANY_CASE = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# as in open_clip: 49,152 entries less 256 bytes and 2 special tokens
_MERGES = 49152 - 256 - 2


def build_clip_tokenizer(
    bpe_path: str | Path | None = None, *, context_length: int = 77, clean: str = "lower"
) -> tuple[bytes, TextSpec]:
    """`tokenizer.json` bytes and the `TextSpec` of open_clip's `SimpleTokenizer`.

    bpe_path: the gzipped merges file, or None for the one inside the open_clip package.
    clean: open_clip's cleaning mode: "lower" (CLIP), "whitespace" (keeps case) or "canonicalize" (CLIPA).

    Encoding a string gives exactly `context_length` ids, start and end tokens included, padded with 0, with the
    end token kept when the text is cut: the same ids as open_clip except for `KNOWN_DIFFERENCES`.
    Pad id 0 is also the id of "!" inside a run of punctuation, as in open_clip, whose causal text tower ignores
    everything after the end token.

    Raises:
        MissingExtraError: open_clip, which brings the merges and ftfy's character tables, is not installed.
    """
    if clean not in _CLEAN:
        raise unknown_name("cleaning mode", clean, _CLEAN)
    if context_length < 3:
        raise UsageError(f"context_length {context_length} leaves no room between start and end tokens; use 3 or more")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    if bpe_path is None:
        bpe_path = Path(str(require("open_clip", "open-clip").__file__)).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(Path(bpe_path).read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    alphabet = _byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    start, end = "<start_of_text>", "<end_of_text>"
    vocab = {token: i for i, token in enumerate([*tokens, start, end])}

    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>")  # type: ignore[arg-type]
    )
    tokenizer.normalizer = _normalizer(clean)
    split = Regex(_SPLIT_ANY_CASE if clean == "whitespace" else _SPLIT)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # matched in the cleaned text, as open_clip's pattern does
    tokenizer.add_special_tokens([AddedToken(t, normalized=True, special=True) for t in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocab[start]), (end, vocab[end])]
    )
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length, pad_id=0, pad_token=tokens[0])
    data = tokenizer.to_str(pretty=False).encode()
    return data, text_spec(data, context_length=context_length)


def text_spec(tokenizer_json: bytes, *, context_length: int, pad_id: int = 0) -> TextSpec:
    """The `TextSpec` that goes with a tokenizer.json; family and vocabulary size are read from the file itself."""
    import hashlib

    from tokenizers import Tokenizer

    kind = json.loads(tokenizer_json)["model"].get("type", "BPE")
    families = {"BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram"}
    if kind not in families:
        raise UsageError(f"tokenizer.json holds a {kind} model, which no runtime here reads; use one of {[*families]}")
    return TextSpec(
        context_length=context_length,
        vocab_size=Tokenizer.from_str(tokenizer_json.decode()).get_vocab_size(with_added_tokens=True),
        pad_id=pad_id,
        family=families[kind],  # type: ignore[arg-type]
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
    )


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in GPT-2's order (which fixes the first 256 ids)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + n) for n in range(len(hidden))]


def _normalizer(clean: str):  # type: ignore[no-untyped-def]  # tokenizers publishes no useful base type
    """The cleaning in the order in which ftfy and open_clip apply it."""
    from tokenizers import Regex, normalizers

    table = require("ftfy.chardata", "open-clip")
    replace = normalizers.Replace
    steps = []
    # open_clip unescapes three times over (ftfy once, html.unescape twice)
    for _ in range(3):
        steps.append(replace("&amp;", "&"))
    for entity, char in (("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"), ("#39", "'"), ("nbsp", " ")):
        steps.append(replace(f"&{entity};", char))
    for mapping in (table.LIGATURES, table.WIDTH_MAP):
        steps += [replace(chr(code), text) for code, text in mapping.items() if chr(code) != text]
    steps.append(replace(Regex(_char_class(table.DOUBLE_QUOTE_RE.pattern)), '"'))
    steps.append(replace(Regex(_char_class(table.SINGLE_QUOTE_RE.pattern)), "'"))
    gone = [code for code, value in table.CONTROL_CHARS.items() if value is None]
    steps.append(replace(Regex("[" + "".join(f"\\x{{{code:X}}}" for code in gone) + "]"), ""))
    steps.append(normalizers.NFC())
    if clean == "canonicalize":
        steps.append(replace("_", " "))
        steps.append(replace(Regex("[" + "".join("\\" + c for c in string.punctuation) + "]"), ""))
    if clean != "whitespace":
        # Python lowers a word-final capital sigma to its final form; the Lowercase step sees one letter at a time
        steps.append(replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"))
        steps.append(normalizers.Lowercase())
    steps.append(replace(Regex(r"\s+"), " "))
    steps.append(normalizers.Strip())
    return normalizers.Sequence(steps)


def _char_class(pattern: str) -> str:
    """A Python character class of plain characters, checked to be one."""
    if not (pattern.startswith("[") and pattern.endswith("]")):
        raise UsageError(
            f"ftfy's quote table has the unexpected form {pattern!r}, so the tokenizer would differ; "
            "install ftfy 6.1 to 6.3"
        )
    return pattern
