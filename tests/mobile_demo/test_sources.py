"""What can be said of Swift and Kotlin files without Apple's or Android's tools: they parse, and tables are fresh."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_kotlin
import tree_sitter_swift

DEMO = Path(__file__).resolve().parents[2] / "mobile_demo"
KOTLIN = [path for path in sorted((DEMO / "android").rglob("*.kt*")) if path.suffix in (".kt", ".kts")]
SWIFT = [path for path in sorted((DEMO / "ios").rglob("*.swift")) if ".build" not in path.parts]
PROJECT = DEMO / "ios/PocketVLMDemo.xcodeproj/project.pbxproj"


def _errors(source: bytes, language: Any) -> list[str]:
    found, waiting = [], [tree_sitter.Parser(tree_sitter.Language(language)).parse(source).root_node]
    while waiting:
        node = waiting.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {node.text!r}"[:120])
        waiting += node.children
    return found


@pytest.mark.parametrize("path", [*KOTLIN, *SWIFT], ids=lambda path: path.name)
def test_a_file_parses(path: Path) -> None:
    language = tree_sitter_swift if path.suffix == ".swift" else tree_sitter_kotlin
    assert not _errors(path.read_bytes(), language.language())


@pytest.mark.parametrize(
    ("language", "broken"),
    [(tree_sitter_kotlin, b"fun a() { val x = }"), (tree_sitter_swift, b"func a( -> Int { return 1 }")],
    ids=["kotlin", "swift"],
)
def test_the_parser_sees_a_fault(language: Any, broken: bytes) -> None:
    assert _errors(broken, language.language())


def test_the_files_are_there() -> None:
    assert len(KOTLIN) > 15
    assert len(SWIFT) > 12


def test_files_stay_readable() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in (*KOTLIN, *SWIFT)}
    assert max(long.values()) <= 500, long
    wide = [path.name for path in (*KOTLIN, *SWIFT) if max(map(len, path.read_text().splitlines())) > 120]
    assert not wide


def test_the_xcode_project_names_what_is_there() -> None:
    text = PROJECT.read_text()
    assert {path.name for path in (DEMO / "ios/App").glob("*.swift")} == set(re.findall(r"path = (\w+\.swift);", text))
    objects = re.findall(r"^\t\t([0-9A-F]{24}) /\* .*? \*/ = \{$", text, re.MULTILINE)
    assert len(objects) == len(set(objects))
    assert set(re.findall(r"\b[0-9A-F]{24}\b", text)) == set(objects)
    assert text.count("{") == text.count("}")


def test_the_core_has_no_android_in_it() -> None:
    core = [path for path in KOTLIN if "core/src" in path.as_posix()]
    imports = {line for path in core for line in path.read_text().splitlines() if line.startswith("import ")}
    assert not [line for line in imports if not re.match(r"import (java|javax|kotlin|org\.junit)\.", line)]


def test_tables_of_characters_are_what_the_library_does() -> None:
    spec = importlib.util.spec_from_file_location("unicode_tables", DEMO / "unicode_tables.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.tables()
    assert module.KOTLIN.read_text() == module.kotlin(found), "run python mobile_demo/unicode_tables.py"
    assert module.SWIFT.read_text() == module.swift(found)
