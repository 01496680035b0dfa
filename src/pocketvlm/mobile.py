"""What an app takes with it: of a bundle's many files those that one platform runs, under a manifest of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pocketvlm.edge.bundle import MANIFEST, Bundle, BundleFolder, BundleVariant, describe_files
from pocketvlm.edge.bundle_write import check_out, staged
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.vlm_bundle import VlmBundle

PlatformName = Literal["ios", "android", "web"]
# where a model that answers in words lies in the web app's bundle, whose manifest lists its files too
ASKED = "vlm"


@dataclass(frozen=True)
class Platform:
    """target: what runs there. precision: taken where the bundle has it. place: in a checkout, where its app looks."""

    target: str
    precision: str
    place: str


PLATFORMS: dict[PlatformName, Platform] = {
    "ios": Platform("coreml", "fp16", "mobile_demo/ios/bundle"),
    "android": Platform("executorch", "int8", "mobile_demo/android/app/src/main/assets/bundle"),
    "web": Platform("onnx", "int8", "mobile_demo/web/public/bundle"),
}


@dataclass(frozen=True)
class Prepared:
    """folder: where the files went. variant: which one. files: path -> bytes, without bundle.json."""

    folder: Path
    variant: BundleVariant
    files: dict[str, int]


def prepare(
    platform: str,
    bundle: str | Path,
    out: str | Path | None = None,
    precision: str = "auto",
    overwrite: bool = False,
    vlm: str | Path | None = None,
) -> Prepared:
    """Copy what one platform needs of a bundle: a variant's files, tokenizer, conformance vectors, a manifest of them.

    The copy is a bundle itself: every file is hashed again where it lies, and only then it takes its place.

    Args:
        platform: "ios", "android" or "web". bundle: folder or zip, verified before anything is copied.
        out: folder; left out, the place where the app of this checkout looks, and a bundle there is replaced.
        precision: "auto" takes the platform's usual one (`PLATFORMS`) or else the most faithful.
        overwrite: replace a bundle in `out`.
        vlm: a bundle of 'pocketvlm vlm export', for the web app's screen that answers questions; it goes into the
            folder `ASKED` at the platform's usual precision. Left out, that screen is not offered.

    Raises:
        UsageError: an unknown platform; the bundle lacks the target or the precision; no `out` outside a checkout;
            `out` is not empty, or is the bundle itself; `vlm` for a platform whose app asks nothing.
        PocketvlmError: a bundle cannot be read, see `Bundle.load`.
    """
    if platform not in get_args(PlatformName):
        raise UsageError(f"unknown platform {platform!r}; there are apps for ios, android and web, so name one of them")
    chosen: Platform = PLATFORMS[platform]  # type: ignore[index]
    loaded = Bundle.load(bundle)
    variant = _variant(loaded, str(platform), chosen, precision)
    if vlm is not None and platform != "web":
        raise UsageError(
            f"--vlm was given and the {platform} app has no screen that asks; {str(vlm)!r} would lie there unused, so "
            "leave it out or prepare the web app"
        )
    asked = None if vlm is None else VlmBundle.load(vlm)
    answering = asked and _variant(asked, str(platform), chosen, "auto")
    if out is None:
        folder, overwrite = _place(str(platform), chosen), True
        if loaded.contract.kind != "dual":
            raise UsageError(
                f"the bundle is of kind {loaded.contract.kind!r} and the demo apps ask in words, which takes a text "
                "tower; they could not start, so export the dual encoder, or give --out for an app of your own"
            )
    else:
        folder = Path(out)
    target = folder.absolute().resolve()
    for given in (loaded, asked) if asked else (loaded,):
        source = given.folder.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise UsageError(
                f"--out {str(folder)!r} and the bundle {str(given.folder)!r} lie in one another; files would be lost, "
                "so choose another folder"
            )
    check_out(folder, overwrite)
    with staged(folder, overwrite) as draft:
        _copy(loaded, variant, draft)
        if asked and answering:
            _copy(asked, answering, draft / ASKED)
            _list_all(draft)
        Bundle.load(draft)  # hashed where it lies: a copy cut short is found here and not on a phone
    return Prepared(folder, variant, {name: entry["bytes"] for name, entry in describe_files(folder).items()})


def _variant(bundle: Bundle | VlmBundle, platform: str, chosen: Platform, precision: str) -> BundleVariant:
    has = [v.precision for v in bundle.variants if v.target == chosen.target]
    if has and precision in ("auto", *has):
        usual = chosen.precision if chosen.precision in has else "auto"
        return bundle.variant(chosen.target, usual if precision == "auto" else precision)
    found = ", ".join(f"{v.target} {v.precision}" for v in bundle.variants) or "no model file"
    wanted = chosen.precision if precision == "auto" else precision
    runs = chosen.target if precision == "auto" else f"{chosen.target} {precision}"
    raise UsageError(
        f"the bundle has {found}, and the {platform} app runs {runs}; it would have nothing to load, "
        f"so export it: {_export(bundle, chosen.target, wanted)} --out DIR"
    )


def _export(bundle: Bundle | VlmBundle, target: str, precision: str) -> str:
    if isinstance(bundle, VlmBundle):
        return f"pocketvlm vlm export FOLDER --targets {target} --precisions {precision}"
    return f"pocketvlm export RUN --targets {target}:{precision}"


def _place(platform: str, chosen: Platform) -> Path:
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "mobile_demo" / platform).is_dir():
            return folder / chosen.place
    raise UsageError(
        f"no --out was given and no checkout with mobile_demo/{platform} lies around {str(here)!r}; where the app "
        "looks for its bundle is unknown, so run this in a checkout or pass --out DIR"
    )


def _copy(bundle: BundleFolder, variant: BundleVariant, draft: Path) -> None:
    kept = _below(bundle, variant.files.values())
    left = _below(bundle, [path for other in bundle.variants for path in other.files.values()]) - kept
    entries: dict[str, Any] = {name: entry for name, entry in bundle.raw["files"].items() if name not in left}
    for name in entries:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, draft / name)
    one = [raw for raw in bundle.raw["variants"] if (raw["target"], raw["precision"], raw.get("dim")) == _key(variant)]
    parity = [row for row in bundle.parity if (row["target"], row["precision"]) == _key(variant)[:2]]
    manifest = {**bundle.raw, "variants": one, "files": entries, "parity": parity}
    _write(draft, manifest)


def _list_all(draft: Path) -> None:
    """Let the outer manifest vouch for every file of the inner bundle, its manifest included."""
    raw = json.loads((draft / MANIFEST).read_text(encoding="utf-8"))
    _write(draft, {**raw, "files": describe_files(draft)})


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(variant: BundleVariant) -> tuple[str, str, int | None]:
    return variant.target, variant.precision, variant.dim


def _below(bundle: BundleFolder, paths: Any) -> set[str]:
    """Listed files among `paths`, and those inside the folders among them (an .mlpackage)."""
    roots = set(paths)
    return {
        name
        for name in bundle.raw["files"]
        if name in roots or any(name.startswith(root.rstrip("/") + "/") for root in roots)
    }
