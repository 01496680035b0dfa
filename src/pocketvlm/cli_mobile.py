"""`pocketvlm mobile`: put a bundle where an app finds it. Works on the base install, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from pocketvlm.table import emit

mobile_app = tyro.extras.SubcommandApp()

_NEXT = {
    "ios": "open mobile_demo/ios in Xcode; its README has the steps",
    "android": "open mobile_demo/android in Android Studio; its README has the steps",
    "web": "in mobile_demo/web: npm ci && npm run dev",
}


def register(app: Any) -> None:
    """Add these commands to the command line."""
    app.command(mobile_app, name="mobile", help="Put a bundle into the iOS, Android or web app.")


@mobile_app.command(name="prepare")
def prepare_app(
    platform: Annotated[Positional[Literal["ios", "android", "web"]], arg(help="Whose files are copied.")],
    bundle: Annotated[
        Positional[Path], arg(metavar="BUNDLE", help="A bundle of 'pocketvlm export': its folder or .zip.")
    ],
    *,
    out: Annotated[
        Path | None, arg(metavar="DIR", help="Folder; left out, where the app under mobile_demo/ looks.")
    ] = None,
    precision: Annotated[
        str, arg(metavar="NAME", help="auto: ios fp16, android and web int8, else the most faithful.")
    ] = "auto",
    overwrite: Annotated[bool, arg(help="Replace a bundle in --out.")] = False,
    vlm: Annotated[
        Path | None, arg(metavar="VLM", help="web: a bundle of 'pocketvlm vlm export' for the screen that answers.")
    ] = None,
    as_json: Annotated[bool, arg(name="json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check a bundle and copy what one platform runs: model, tokenizer, conformance vectors, manifest."""
    from pocketvlm.mobile import prepare

    done = prepare(platform, bundle, out, precision, overwrite, vlm)
    if as_json:
        told = {"folder": str(done.folder), "target": done.variant.target, "precision": done.variant.precision}
        print(json.dumps({**told, "files": done.files}, indent=2))
        return
    parts: dict[str, tuple[int, int]] = {}
    for name, size in done.files.items():
        part = name.partition("/")[0]
        files, total = parts.get(part, (0, 0))
        parts[part] = (files + 1, total + size)
    rows = [{"part": part, "files": files, "MB": round(total / 1e6, 2)} for part, (files, total) in parts.items()]
    emit(rows, False, title=f"{done.variant.target} {done.variant.precision} for {platform}")
    print(f"bundle: {done.folder}")
    if out is None:
        print(f"next:   {_NEXT[platform]}")
