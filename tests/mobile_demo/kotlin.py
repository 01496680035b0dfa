"""Compile the Kotlin core with the compiler inside the PyPI package kotlin-jupyter-kernel, and run it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "mobile_demo/android/core/src"
ENCODER = Path(__file__).with_name("kotlin_encoder.py")


def _lacking(what: str) -> None:
    """A missing compiler is a failure: green would mean that nothing was compiled. `-m "not kotlin"` leaves it out."""
    pytest.fail(f"{what}, so the Kotlin core cannot be checked")


def jars() -> list[Path]:
    try:
        files = metadata.files("kotlin-jupyter-kernel") or []
    except metadata.PackageNotFoundError:
        _lacking("kotlin-jupyter-kernel is not installed (pip install 'pocketvlm[dev]')")
        raise
    return sorted(Path(str(file.locate())) for file in files if file.suffix == ".jar")


def compile_core() -> str:
    """The class path of the compiled core and its command; compiled once for the same sources and compiler."""
    if shutil.which("java") is None:
        _lacking("there is no Java (Debian: openjdk-17-jre-headless)")
    found = jars()
    standard = next(jar for jar in found if jar.name.startswith("kotlin-stdlib"))
    sources = [*sorted((CORE / "main").rglob("*.kt")), CORE / "test/kotlin/dev/pocketvlm/JvmDecoder.kt"]
    sources.append(CORE / "test/kotlin/dev/pocketvlm/Main.kt")
    digest = hashlib.sha256("\0".join([standard.name, *(path.read_text() for path in sources)]).encode()).hexdigest()
    cache = Path(os.environ.get("POCKETVLM_CACHE", tempfile.gettempdir())) / f"kotlin-{digest[:16]}"
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        draft = tempfile.mkdtemp(prefix="kotlin-", dir=cache.parent)
        command = ["java", "-Xmx1g", "-XX:+UseSerialGC", "-cp", ":".join(map(str, found))]
        command += ["org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib", "-no-reflect", "-Werror"]
        command += ["-classpath", str(standard), "-d", draft, *map(str, sources)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        try:
            Path(draft).rename(cache)
        except OSError:  # another process was first
            shutil.rmtree(draft)
    return f"{cache}:{standard}"


def kotlin(classes: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = ["java", "-Xmx512m", "-cp", classes, "dev.pocketvlm.MainKt", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, encoding="utf-8")


def encoder(bundle: Path, backend: str, precision: str) -> list[str]:
    return ["--precision", precision, "--encoder", sys.executable, str(ENCODER), str(bundle), backend, precision]
