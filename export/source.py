"""What can be exported: a student, a run or student folder, or somebody else's dual encoder, all in one shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from pocketvlm.distill.environment import without_folders
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.targets.base import Towers

if TYPE_CHECKING:
    from pocketvlm.students.student import Student

Licences = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Exportable:
    """A model ready for every target.

    towers: graphs and contract. tokenizer_json: the file's bytes, None without a text tower. licences: (what, licence,
    attribution) rows that must travel with it. provenance: plain JSON facts about where it came from.
    """

    towers: Towers
    tokenizer_json: bytes | None
    licences: Licences = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer under the contract's text spec, or None without a text tower."""
        spec = self.towers.contract.text
        if spec is None:
            return None
        if self.tokenizer_json is None:
            raise UsageError(
                "a model with a text tower was given without tokenizer.json; no runtime could feed it, "
                "so pass the tokenizer's bytes"
            )
        return Tokenizer(self.tokenizer_json, spec)


Source = Union["Student", Exportable, str, Path]


def open_source(source: Source, *, allow_download: bool = False, trust_remote_code: bool = False) -> Exportable:
    """Anything that `export_bundle` takes, as an `Exportable`.

    source: a `Student`; a run folder or a folder of `save_student`; "open_clip:..." or "hf:..." for an existing dual
    encoder; an `Exportable`, which is returned as it is. allow_download, trust_remote_code: for such an encoder, as
    `teachers.load_teacher` takes them.

    Raises:
        UsageError: nothing there that can be exported. IntegrityError: files that do not match their hashes.
    """
    if isinstance(source, Exportable):
        return source
    from pocketvlm.export.foreign import is_foreign, load_foreign

    if is_foreign(source):
        return load_foreign(str(source), allow_download=allow_download, trust_remote_code=trust_remote_code)
    if isinstance(source, (str, Path)):
        return _from_folder(Path(source))
    return _from_student(source, {}, ())


def _from_folder(folder: Path) -> Exportable:
    from pocketvlm.students import load_student

    if not folder.is_dir():
        raise UsageError(
            f"{str(folder)!r} is not a folder, so there is nothing to export; give a run folder of 'pocketvlm "
            "distill', a saved student, or open_clip:... / hf:... for an existing model"
        )
    provenance: dict[str, Any] = {}
    licences: Licences = ()
    recipe, environment = folder / "recipe.yaml", folder / "environment.json"
    if recipe.is_file():
        provenance["recipe"] = _recipe_text(recipe)
    if environment.is_file():
        facts = without_folders(_read_json(environment))
        licences = tuple((str(w), str(licence), str(who)) for w, licence, who in facts.pop("licences", []))
        provenance["teacher"] = facts.pop("teacher", None)
        provenance["data"] = (facts.get("data") or {}).get("train", {}).get("name")
        provenance["training_environment"] = facts
    return _from_student(load_student(folder), provenance, licences)


def _from_student(student: Student, provenance: dict[str, Any], licences: Licences) -> Exportable:
    from pocketvlm.students.deploy import deploy_image, deploy_text

    contract = student.contract
    # graphs are float32 whatever the student was trained in; the contract names the trained weights
    text = None if contract.text is None else deploy_text(student).float()
    towers = Towers(deploy_image(student).float(), text, contract)
    rows = tuple(dict.fromkeys((*student.licences, *licences)))
    facts = {"student": student.config.name} | provenance
    return Exportable(towers, None if text is None else student.tokenizer_json, rows, facts)


def _recipe_text(path: Path) -> str:
    """The recipe as it travels: without the folders of this machine; the run folder keeps it whole."""
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{str(path)!r} is not YAML ({error}); restore it, or export the student folder") from error
    return str(yaml.safe_dump(without_folders(recipe), sort_keys=False, allow_unicode=True, width=110))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not JSON ({error}); restore it, or export the student folder") from error
    return dict(facts)
