"""Where a bundle is written: a folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pocketvlm.edge.bundle import MANIFEST
from pocketvlm.edge.errors import UsageError


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that is not empty, unless it holds a bundle that may be replaced.

    Raises:
        UsageError: `out` is a file, or holds anything and `overwrite` is not set, or holds no bundle.
    """
    if out.is_file():
        raise UsageError(f"output {str(out)!r} is a file and a bundle is a folder; name another path")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(
                f"output folder {str(out)!r} is not empty; its files would be replaced, "
                "so pass overwrite (--overwrite) or choose another folder"
            )
        if not (out / MANIFEST).is_file():
            raise UsageError(
                f"output folder {str(out)!r} holds files but no {MANIFEST}, so it is not a bundle and is not deleted; "
                "choose another folder"
            )


@contextlib.contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A scratch folder beside `out` that takes its place on success and vanishes on failure.

    Raises:
        UsageError: see `check_out`; or the file system refuses.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".partial", dir=parent))
    try:
        draft = scratch / "bundle"
        draft.mkdir()
        yield draft
        check_out(out, overwrite)  # somebody may have written there meanwhile
        if out.exists():
            os.replace(out, scratch / "previous")
        try:
            os.replace(draft, out)
        except OSError:
            if (scratch / "previous").exists():
                os.replace(scratch / "previous", out)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise UsageError(
            f"the bundle could not be written to {str(out)!r} ({error.strerror}); nothing was left behind, "
            "so free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
