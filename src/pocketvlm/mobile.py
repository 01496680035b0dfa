"""What an app takes with it: of a bundle's many files those that one platform runs, under a manifest of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pocketvlm.edge.bundle import MANIFEST, Bundle, BundleVariant, describe_files
from pocketvlm.edge.bundle_write import check_out, staged
from pocketvlm.edge.errors import UsageError

PlatformName = Literal["ios", "android", "web"]


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
    platform: str, bundle: str | Path, out: str | Path | None = None, precision: str = "auto", overwrite: bool = False
) -> Prepared:
    """Copy what one platform needs of a bundle: a variant's files, tokenizer, conformance vectors, a manifest of them.

    The copy is a bundle itself: every file is hashed again where it lies, and only then it takes its place.

    Args:
        platform: "ios", "android" or "web". bundle: folder or zip, verified before anything is copied.
        out: folder; left out, the place where the app of this checkout looks, and a bundle there is replaced.
        precision: "auto" takes the platform's usual one (`PLATFORMS`) or else the most faithful.
        overwrite: replace a bundle in `out`.

    Raises:
        UsageError: an unknown platform; the bundle lacks the target or the precision; no `out` outside a checkout;
            `out` is not empty, or is the bundle itself.
        PocketvlmError: the bundle cannot be read, see `Bundle.load`.
    """
    if platform not in get_args(PlatformName):
        raise UsageError(f"unknown platform {platform!r}; there are apps for ios, android and web, so name one of them")
    chosen: Platform = PLATFORMS[platform]  # type: ignore[index]
    loaded = Bundle.load(bundle)
    variant = _variant(loaded, str(platform), chosen, precision)
    if out is None:
        folder, overwrite = _place(str(platform), chosen), True
        if loaded.contract.kind != "dual":
            raise UsageError(
                f"the bundle is of kind {loaded.contract.kind!r} and the demo apps ask in words, which takes a text "
                "tower; they could not start, so export the dual encoder, or give --out for an app of your own"
            )
    else:
        folder = Path(out)
    source, target = loaded.folder.resolve(), folder.absolute().resolve()
    if source == target or source in target.parents or target in source.parents:
        raise UsageError(
            f"--out {str(folder)!r} and the bundle {str(bundle)!r} lie in one another; files would be lost, "
            "so choose another folder"
        )
    check_out(folder, overwrite)
    with staged(folder, overwrite) as draft:
        _copy(loaded, variant, draft)
        Bundle.load(draft)  # hashed where it lies: a copy cut short is found here and not on a phone
    return Prepared(folder, variant, {name: entry["bytes"] for name, entry in describe_files(folder).items()})


def _variant(bundle: Bundle, platform: str, chosen: Platform, precision: str) -> BundleVariant:
    has = [v.precision for v in bundle.variants if v.target == chosen.target]
    if has and precision in ("auto", *has):
        usual = chosen.precision if chosen.precision in has else "auto"
        return bundle.variant(chosen.target, usual if precision == "auto" else precision)
    found = ", ".join(f"{v.target} {v.precision}" for v in bundle.variants) or "no model file"
    wanted = chosen.precision if precision == "auto" else precision
    runs = chosen.target if precision == "auto" else f"{chosen.target} {precision}"
    raise UsageError(
        f"the bundle has {found}, and the {platform} app runs {runs}; it would have nothing to load, "
        f"so export it: pocketvlm export RUN --targets {chosen.target}:{wanted} --out DIR"
    )


def _place(platform: str, chosen: Platform) -> Path:
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "mobile_demo" / platform).is_dir():
            return folder / chosen.place
    raise UsageError(
        f"no --out was given and no checkout with mobile_demo/{platform} lies around {str(here)!r}; where the app "
        "looks for its bundle is unknown, so run this in a checkout or pass --out DIR"
    )


def _copy(bundle: Bundle, variant: BundleVariant, draft: Path) -> None:
    kept = _below(bundle, variant.files.values())
    left = _below(bundle, [path for other in bundle.variants for path in other.files.values()]) - kept
    entries: dict[str, Any] = {name: entry for name, entry in bundle.raw["files"].items() if name not in left}
    for name in entries:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, draft / name)
    one = [raw for raw in bundle.raw["variants"] if (raw["target"], raw["precision"], raw.get("dim")) == _key(variant)]
    parity = [row for row in bundle.parity if (row["target"], row["precision"]) == _key(variant)[:2]]
    manifest = {**bundle.raw, "variants": one, "files": entries, "parity": parity}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(variant: BundleVariant) -> tuple[str, str, int | None]:
    return variant.target, variant.precision, variant.dim


def _below(bundle: Bundle, paths: Any) -> set[str]:
    """Listed files among `paths`, and those inside the folders among them (an .mlpackage)."""
    roots = set(paths)
    return {
        name
        for name in bundle.raw["files"]
        if name in roots or any(name.startswith(root.rstrip("/") + "/") for root in roots)
    }
