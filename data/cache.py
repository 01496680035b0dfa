"""Where derived data lives."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for data that can be made again.

    POCKETVLM_CACHE, else XDG_CACHE_HOME/pocketvlm, else ~/.cache/pocketvlm.

    It is not created here; whoever writes creates it.
    """
    own = os.environ.get("POCKETVLM_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "pocketvlm"
