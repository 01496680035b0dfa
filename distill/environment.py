"""The machine and the software that a run happened on, as `environment.json`. No host, user or folder is recorded."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pocketvlm

if TYPE_CHECKING:
    import torch

    from pocketvlm.distill.prepare import Prepared

# the folders of an absolute path that begins a value or stands behind ":", "=" and the like; "//" begins an address
_FOLDERS = re.compile(r"""((?:^|[:@=,\["'])\s*)/(?!/)(?:[^/:@=?&,"'\]]*/)*(?=[^/:@=?&,"'\]])""")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "Pillow", "tokenizers", "safetensors", "pydantic")


def describe_environment(**extra: Any) -> dict[str, Any]:
    """Versions, processor, accelerator, the kit's commit (if it runs from a checkout), and `extra`."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    facts: dict[str, Any] = {
        "pocketvlm": pocketvlm.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
    }
    if torch.cuda.is_available():
        facts["cuda"] = {
            "device": torch.cuda.get_device_name(0),
            "version": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return without_folders(facts | extra)


def run_environment(prepared: Prepared, device: torch.device, ranks: int) -> str:
    """The text of a run's environment.json. ranks: how many processes train it."""
    from pocketvlm.teachers.device import describe_device

    recipe, teacher = prepared.recipe, prepared.teacher
    facts = describe_environment(
        recipe_sha256=recipe.digest(),
        device=describe_device(device),
        ranks=ranks,
        data={
            "train": prepared.source.summary(),
            "eval": prepared.held_out.summary() if prepared.held_out else None,
            "text_pool": len(prepared.texts),
        },
        teacher={"name": teacher.name, "fingerprint": teacher.fingerprint, "dim": teacher.dim} if teacher else None,
        licences=[list(row) for row in prepared.licences],
    )
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def command_line() -> str:
    """The command that is running, without the folders of absolute paths."""
    parts = without_folders(sys.argv)
    # python -m pocketvlm.cli is the same program
    ours = parts[:1] in (["__main__.py"], ["cli.py"])
    return " ".join(["pocketvlm" if ours else parts[0] if parts else "python", *parts[1:]])


def without_folders(value: Any) -> Any:
    """JSON-like `value` whose strings have every absolute path, also inside hf:/a/model or data.train=/a/x.jsonl, cut
    to its last part: what is recorded and shipped must not name a machine."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    path, mark, options = value.partition("?")
    path = Path(path).name or path if os.path.isabs(path) else _FOLDERS.sub(r"\1", path)
    return path + mark + _FOLDERS.sub(r"\1", options)


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+changes" when files differ; None elsewhere."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
