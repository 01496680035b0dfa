"""Write UnicodeTables.kt and UnicodeTables.swift: the code points that `tokenizers` drops, spaces or splits at.

The library carries tables of an old Unicode version, every phone those of its own. So the answers are asked of the
library, code point by code point, and travel as ranges: `python mobile_demo/unicode_tables.py` (needs tokenizers).
"""

from __future__ import annotations

import textwrap
import unicodedata
from pathlib import Path

from tokenizers import normalizers, pre_tokenizers

HERE = Path(__file__).parent
KOTLIN = HERE / "android/core/src/main/kotlin/dev/pocketvlm/UnicodeTables.kt"
SWIFT = HERE / "ios/PocketVLM/Sources/PocketVLM/UnicodeTables.swift"
_ABOUT = {
    "control": "dropped by clean_text",
    "mark": "nonspacing marks, dropped by strip_accents after NFD",
    "punctuation": "a word of its own",
    "ideograph": "set between spaces by handle_chinese_chars",
}


def tables() -> dict[str, str]:
    """Name -> ranges of code points in hexadecimal, "300-36f 483-487 591"."""

    def bert(**on: bool) -> normalizers.BertNormalizer:
        off = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
        return normalizers.BertNormalizer(**{**off, **on})

    clean, accents = bert(clean_text=True), bert(strip_accents=True)
    chinese, split = bert(handle_chinese_chars=True), pre_tokenizers.BertPreTokenizer()
    found: dict[str, list[int]] = {name: [] for name in _ABOUT}
    # without surrogates and planes 4 to 13, which Unicode leaves empty
    for code in (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0x110000)):
        text = f"a{chr(code)}a"
        if clean.normalize_str(text) == "aa":
            found["control"].append(code)
        if unicodedata.normalize("NFD", chr(code)) == chr(code) and accents.normalize_str(text) == "aa":
            found["mark"].append(code)
        if len(split.pre_tokenize_str(text)) == 3:
            found["punctuation"].append(code)
        if len(chinese.normalize_str(text)) == 5:
            found["ideograph"].append(code)
    return {name: _ranges(codes) for name, codes in found.items()}


def _ranges(codes: list[int]) -> str:
    spans: list[list[int]] = []
    for code in codes:
        if spans and code == spans[-1][1] + 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    return " ".join(f"{low:x}" if low == high else f"{low:x}-{high:x}" for low, high in spans)


def kotlin(found: dict[str, str]) -> str:
    """The Kotlin file."""
    parts = ["package dev.pocketvlm\n\n// Written by mobile_demo/unicode_tables.py; do not edit.\n"]
    for name, ranges in found.items():
        body = textwrap.fill(ranges, 116, break_on_hyphens=False)
        parts.append(f'\n/** {_ABOUT[name]} */\ninternal val {name.upper()} = CodePoints(\n    """\n{body}\n""",\n)\n')
    return "".join(parts)


def swift(found: dict[str, str]) -> str:
    """The Swift file."""
    parts = ["// Written by mobile_demo/unicode_tables.py; do not edit.\n"]
    for name, ranges in found.items():
        body = textwrap.fill(ranges, 116, break_on_hyphens=False)
        parts.append(f'\n/// {_ABOUT[name]}\nlet {name}Table = CodePoints(\n    """\n    ')
        parts.append(body.replace("\n", "\n    ") + '\n    """)\n')
    return "".join(parts)


if __name__ == "__main__":
    asked = tables()
    KOTLIN.write_text(kotlin(asked), encoding="utf-8")
    SWIFT.write_text(swift(asked), encoding="utf-8")
