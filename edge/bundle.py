"""The shipped folder: `bundle.json` and the files that it vouches for.

A bundle is read only after every file matched its sha256; what is not listed is never opened. Layout::

    bundle.json                 contract, variants, files with hashes, provenance, parity summary, licences
    tokenizer.json              where the model has a text tower
    <target>/...                model files of each variant
    conformance/vectors.json    image bytes -> pixels -> embedding and strings -> ids -> embedding

Compatibility rule of `schema_version` "MAJOR.MINOR": a reader of 1.m reads every 1.k with k <= m.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import IntegrityError, PocketvlmError, UsageError, VersionError, unknown_name

SCHEMA_VERSION = "1.0"
MANIFEST = "bundle.json"
# what "auto" tries, most faithful first
PRECISION_ORDER = (
    *("fp32", "fp16", "w8", "palette8", "mixed", "int8", "w8a8-dynamic", "w8a8-static", "palette6", "w4", "palette4"),
)
UNZIPPED_LIMIT = 8 << 30  # bytes; stops an archive that expands without end

# written by file managers; they hold nothing of ours and nothing reads them
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class BundleVariant:
    """One target at one precision.

    files: tower ("image", "text") -> path relative to the bundle folder (a folder for `.mlpackage`).
    batch: "dynamic" or "fixed-1". dim: width of the embedding, None for the contract's `embed_dim`.
    """

    target: str
    precision: str
    files: Mapping[str, str]
    batch: str = "dynamic"
    dim: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Licence:
    """A licence that travels with the bundle: what it covers, its name, who to credit, where it came from."""

    what: str
    licence: str
    attribution: str
    url: str = ""


class BundleFolder:
    """Files of a folder that its bundle.json vouches for, whatever model they hold: what `Bundle` and
    `edge.vlm_bundle.VlmBundle` share.

    folder: where the files are (a private temporary folder for a zip; it lives as long as this object).
    variants: in the order of bundle.json. raw: bundle.json as parsed. parity: one summary per checked variant.
    licences: see `Licence`. provenance: how the bundle was made.
    """

    def __init__(self, folder: Path, raw: dict[str, Any]) -> None:
        self.folder = folder
        self.raw = raw
        self.variants = tuple(_variant(entry) for entry in raw["variants"])
        self.parity: list[dict[str, Any]] = list(raw.get("parity", []))
        self.licences = tuple(_licence(row) for row in raw.get("licences", []))
        self.provenance: dict[str, Any] = dict(raw.get("provenance", {}))

    @classmethod
    def load(cls, bundle: str | Path, verify: bool = True) -> Self:
        """Open a bundle folder or a zip of one.

        Args:
            bundle: the folder that holds bundle.json, or a zip with it at its root or in its only folder.
            verify: hash every listed file and refuse unlisted ones. Version, presence and structure are
                checked in any case.

        Raises:
            UsageError: there is no bundle at this path, or one of another kind of model.
            VersionError: written under a newer schema (or another major one).
            IntegrityError: a file is missing, changed or unlisted; bundle.json is malformed; a zip member
                would land outside the folder.
        """
        path = Path(bundle)
        if path.is_file():
            folder, holder = _unzip(path)
            try:
                loaded = cls._read(folder, verify)
            except BaseException:
                shutil.rmtree(holder, ignore_errors=True)
                raise
            weakref.finalize(loaded, shutil.rmtree, holder, ignore_errors=True)
            return loaded
        if not (path / MANIFEST).is_file():
            problem = "has no bundle.json" if path.is_dir() else "does not exist"
            raise UsageError(
                f"bundle {str(path)!r} {problem}; there is no model to load, "
                "so give the folder or zip that 'pocketvlm export' wrote"
            )
        return cls._read(path, verify)

    @classmethod
    def _made(cls, folder: Path, raw: dict[str, Any]) -> Self:
        """The object for a parsed bundle.json; what its contract says is checked here."""
        raise NotImplementedError

    @classmethod
    def _read(cls, folder: Path, verify: bool) -> Self:
        try:
            raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise malformed(f"bundle.json is not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise malformed("bundle.json is not an object")
        check_schema_version(raw.get("schema_version"), "bundle")
        try:
            loaded = cls._made(folder, raw)
            for relative, entry in raw["files"].items():
                _check_relative(relative)
                if not isinstance(entry["sha256"], str):
                    raise TypeError(f"files[{relative!r}].sha256 is no string")
        except PocketvlmError:
            raise
        except (KeyError, TypeError, AttributeError) as error:
            raise malformed(f"bundle.json lacks or garbles a field ({type(error).__name__}: {error})") from error
        loaded._check_presence()
        if verify:
            loaded.verify()
        return loaded

    def path(self, relative: str) -> Path:
        """A listed file, or a folder of listed files, of this bundle.

        Raises:
            IntegrityError: bundle.json does not list it.
        """
        files = self.raw["files"]
        if relative not in files and not any(name.startswith(relative.rstrip("/") + "/") for name in files):
            raise IntegrityError(
                f"the bundle does not list {relative!r} among its files, so nothing vouches for it; "
                "it stays unread: export the bundle again"
            )
        return self.folder / relative

    def hashes(self, variant: BundleVariant) -> dict[str, str]:
        """sha256 of every file of a variant, as bundle.json vouches for them."""
        return {
            name: entry["sha256"]
            for name, entry in self.raw["files"].items()
            if any(name == path or name.startswith(path.rstrip("/") + "/") for path in variant.files.values())
        }

    def verify(self) -> None:
        """Hash every listed file and look for unlisted ones.

        Raises:
            IntegrityError: naming the first file that differs.
        """
        files = self.raw["files"]
        for relative, entry in sorted(files.items()):
            found = sha256_file(self.folder / relative)
            if found != entry["sha256"]:
                raise IntegrityError(
                    f"bundle file {relative!r} has sha256 {found[:16]}… and bundle.json says {entry['sha256'][:16]}…; "
                    "it was changed or damaged after export and may compute anything, so copy or export it again"
                )
        for relative in list_files(self.folder):
            if relative not in files:
                raise IntegrityError(
                    f"bundle file {relative!r} is not listed in bundle.json, so nothing vouches for it; "
                    "a runtime might read it beside the model: remove it or export the bundle again"
                )

    def _check_presence(self) -> None:
        named = [path for variant in self.variants for path in variant.files.values()]
        named += [self.raw[key] for key in ("tokenizer", "conformance") if self.raw.get(key)]
        for relative in named:
            self.path(relative)
        for relative in self.raw["files"]:
            file = self.folder / relative
            if file.is_symlink() or not file.is_file():
                raise IntegrityError(
                    f"bundle file {relative!r} is listed in bundle.json and missing from {str(self.folder)!r}; "
                    "the bundle is incomplete, so copy or export it again"
                )


class Bundle(BundleFolder):
    """A verified bundle folder of embeddings or a classifier. Make one with `Bundle.load`.

    contract: what the model expects and promises.
    """

    def __init__(self, folder: Path, raw: dict[str, Any], contract: ModelContract) -> None:
        super().__init__(folder, raw)
        self.contract = contract

    def __repr__(self) -> str:
        kinds = ", ".join(f"{v.target} {v.precision}" for v in self.variants)
        return f"Bundle({str(self.folder)!r}, {self.contract.name}: {kinds})"

    @classmethod
    def _made(cls, folder: Path, raw: dict[str, Any]) -> Self:
        if raw["contract"].get("kind") == "vlm":
            raise UsageError(
                f"bundle {str(folder)!r} holds a model that answers in words and one that embeds is expected; it has "
                "no embeddings, so open it with pocketvlm.edge.vlm.EdgeVLM or 'pocketvlm vlm ask'"
            )
        loaded = cls(folder, raw, ModelContract.from_dict(raw["contract"]))
        if raw.get("contract_sha256") not in (None, loaded.contract.digest()):
            raise malformed("the contract in bundle.json is not the one that it was exported with")
        return loaded

    def variant(self, target: str, precision: str = "auto", dim: int | None = None) -> BundleVariant:
        """The variant for this target and precision; "auto" takes the most faithful (`PRECISION_ORDER`).

        Raises:
            UnknownNameError: no variant has this target, or none of that target this precision or width.
        """
        of_target = [v for v in self.variants if v.target == target]
        if not of_target:
            raise unknown_name("target of this bundle", target, {v.target for v in self.variants})
        of_dim = [v for v in of_target if dim is None or (v.dim or self.contract.embed_dim) == dim]
        if not of_dim:
            widths = {str(v.dim or self.contract.embed_dim) for v in of_target}
            raise unknown_name(f"embedding width of this bundle's {target} variants", str(dim), widths)
        if dim is None:  # the full width unless another is asked for
            of_dim = sorted(of_dim, key=lambda v: -(v.dim or self.contract.embed_dim))
        wanted = PRECISION_ORDER if precision == "auto" else (precision,)
        for name in wanted:
            for variant in of_dim:
                if variant.precision == name:
                    return variant
        if precision == "auto":
            return of_dim[0]
        raise unknown_name(f"precision of this bundle's {target} variants", precision, {v.precision for v in of_dim})

    def conformance(self) -> dict[str, Any]:
        """The language-neutral test vectors, as parsed from `conformance/vectors.json`.

        Raises:
            IntegrityError: the bundle has none, or the file is not JSON.
        """
        relative = self.raw.get("conformance")
        if not relative:
            raise IntegrityError(
                "the bundle has no conformance vectors, so a runtime cannot be checked against it; export it again"
            )
        try:
            return json.loads(self.path(relative).read_text(encoding="utf-8"))
        except ValueError as error:
            raise malformed(f"{relative} is not JSON ({error})") from error


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all files under a bundle folder, sorted, without bundle.json and desktop litter."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(
        p.as_posix() for p in found if p.as_posix() != MANIFEST and p.name not in _LITTER and p.name[:2] != "._"
    )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The `files` object of bundle.json for what lies under `folder` now: path -> {"sha256", "bytes"}."""
    return {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
        for name in list_files(folder)
    }


def check_schema_version(found: object, what: str, supported: str = SCHEMA_VERSION) -> None:
    """Refuse a schema version that this release cannot read.

    Raises:
        VersionError: another major version, a newer minor one, or no version at all.
    """
    major, minor = (int(part) for part in supported.split("."))
    parts = found.split(".") if isinstance(found, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise VersionError(
            f"the {what} has schema version {found!r} and one like {supported!r} is expected; "
            "its meaning is unknown, so export it again"
        )
    if int(parts[0]) < major:
        raise VersionError(
            f"the {what} has schema version {found} and this release reads {major}.x up to {supported}; "
            "its fields mean other things, so export it again with this release"
        )
    if (int(parts[0]), int(parts[1])) > (major, minor):
        raise VersionError(
            f"the {what} has schema version {found}, newer than the {supported} that this release reads; "
            "parts of it would be ignored, so upgrade pocketvlm (pip install --upgrade pocketvlm)"
        )


def _variant(entry: dict[str, Any]) -> BundleVariant:
    files = dict(entry["files"])
    for relative in files.values():
        _check_relative(relative)
    return BundleVariant(
        target=entry["target"],
        precision=entry["precision"],
        files=files,
        batch=entry.get("batch", "dynamic"),
        dim=entry.get("dim"),
        notes=dict(entry.get("notes") or {}),
    )


def _licence(row: dict[str, Any]) -> Licence:
    return Licence(row["what"], row["licence"], row.get("attribution") or "", row.get("url") or "")


def malformed(detail: str) -> IntegrityError:
    """The error for a bundle.json that cannot be read."""
    return IntegrityError(f"{detail}; the bundle cannot be read, so copy or export it again")


def _check_relative(relative: object) -> None:
    if not isinstance(relative, str) or not _stays_inside(relative):
        raise IntegrityError(
            f"bundle.json names the file {relative!r}, which is not a plain path inside the bundle; "
            "reading it could leave the folder, so the bundle is refused: get it from its maker again"
        )


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and ":" not in name and "\0" not in name
    return plain and not path.is_absolute() and ".." not in path.parts and path.as_posix() == name


# --- zip ----------------------------------------------------------------------------------------------------


def _unzip(path: Path) -> tuple[Path, Path]:
    """Extract to a new temporary folder; returns the bundle folder and the folder to remove in the end."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise IntegrityError(
            f"{str(path)!r} is neither a bundle folder nor a readable zip of one ({error}); "
            "there is no model to load, so give what 'pocketvlm export' wrote"
        ) from error
    holder = Path(tempfile.mkdtemp(prefix="pocketvlm-bundle-"))
    try:
        with archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            _check_members(members, path)
            for member in members:
                target = holder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)
        return _find_manifest(holder, path), holder
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, zlib.error) as error:
        shutil.rmtree(holder, ignore_errors=True)
        raise IntegrityError(
            f"bundle zip {str(path)!r} cannot be unpacked ({error}); it is damaged, encrypted or the disk is full, "
            "so copy it again or unzip it by hand"
        ) from error
    except BaseException:
        shutil.rmtree(holder, ignore_errors=True)
        raise


def _check_members(members: Iterable[zipfile.ZipInfo], path: Path) -> None:
    total, seen = 0, set()
    for member in members:
        name = member.filename
        if not _stays_inside(name) or stat.S_ISLNK(member.external_attr >> 16):
            raise IntegrityError(
                f"bundle zip {str(path)!r} holds the member {name!r}, which is a link or would land outside the "
                "folder; nothing was unpacked, so get the bundle from its maker again"
            )
        if name.casefold() in seen:
            raise IntegrityError(
                f"bundle zip {str(path)!r} holds the member {name!r} twice; which one was hashed is unclear, "
                "so zip the bundle folder again"
            )
        seen.add(name.casefold())
        total += member.file_size
    if total > UNZIPPED_LIMIT:
        raise IntegrityError(
            f"bundle zip {str(path)!r} would unpack to {total} bytes, more than the limit of {UNZIPPED_LIMIT}; "
            "it could fill the disk, so unzip it by hand if you trust it"
        )


def _find_manifest(holder: Path, path: Path) -> Path:
    if (holder / MANIFEST).is_file():
        return holder
    inner = [p for p in holder.iterdir() if p.is_dir() and p.name != "__MACOSX"]
    if len(inner) == 1 and (inner[0] / MANIFEST).is_file():
        return inner[0]
    raise IntegrityError(
        f"bundle zip {str(path)!r} has no bundle.json at its root or in its only folder; "
        "there is no model to load, so zip the bundle folder itself"
    )
