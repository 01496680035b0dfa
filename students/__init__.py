"""Small dual encoders for phones: timm image towers, compact text towers, projections, deploy forms.

`build_student` makes one from a named configuration, `save_student` and `load_student` keep it on disk with
hashes, `deploy_image` and `deploy_text` give the graphs that an exporter lowers. docs/students.md lists the named
students with their sizes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "pocketvlm.students":
    raise ImportError(
        "import this package as pocketvlm.students; a second copy under 'students' would duplicate every class"
    )

if TYPE_CHECKING:
    from pocketvlm.students.axes import change_axes
    from pocketvlm.students.build import build_student
    from pocketvlm.students.config import StudentConfig, load_config, student_names
    from pocketvlm.students.deploy import deploy_image, deploy_text
    from pocketvlm.students.info import StudentInfo, list_students
    from pocketvlm.students.inherit import inherit_tokenizer
    from pocketvlm.students.io import load_student, save_student
    from pocketvlm.students.ridge import fit_projection
    from pocketvlm.students.student import Student, TowerOutput, check_widths
    from pocketvlm.students.task import Classes
    from pocketvlm.students.tokenizer import train_tokenizer
    from pocketvlm.students.truncate import truncated

# name -> submodule; loaded on first use, so that listing the package costs nothing
_LAZY = {
    "change_axes": "axes",
    "build_student": "build",
    "StudentConfig": "config",
    "load_config": "config",
    "student_names": "config",
    "deploy_image": "deploy",
    "deploy_text": "deploy",
    "StudentInfo": "info",
    "list_students": "info",
    "inherit_tokenizer": "inherit",
    "load_student": "io",
    "save_student": "io",
    "fit_projection": "ridge",
    "Student": "student",
    "TowerOutput": "student",
    "check_widths": "student",
    "Classes": "task",
    "train_tokenizer": "tokenizer",
    "truncated": "truncate",
}
__all__ = [
    "Classes",
    "Student",
    "StudentConfig",
    "StudentInfo",
    "TowerOutput",
    "build_student",
    "change_axes",
    "check_widths",
    "deploy_image",
    "deploy_text",
    "fit_projection",
    "inherit_tokenizer",
    "list_students",
    "load_config",
    "load_student",
    "save_student",
    "student_names",
    "train_tokenizer",
    "truncated",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pocketvlm.students' has no attribute {name!r}")
    from pocketvlm.edge.errors import require

    for module in ("torch", "timm", "pydantic", "yaml", "safetensors"):
        require(module, "distill")
    return getattr(importlib.import_module(f"pocketvlm.students.{_LAZY[name]}"), name)
