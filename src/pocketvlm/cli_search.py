"""Commands over a folder of pictures: `index` makes it searchable, `search` finds by words or by a picture.

In the manner of `cli`: everything heavy is imported inside them, and no torch.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError, counted
from pocketvlm.table import emit, emit_record, printable

if TYPE_CHECKING:
    from pocketvlm.edge.index import EmbeddingIndex, Hit
    from pocketvlm.edge.index_folder import SyncProgress, SyncReport
    from pocketvlm.edge.model import EdgeModel

Json = Annotated[bool, arg(name="json", help="Print JSON instead of a table.")]
Folder = Annotated[Positional[Path], arg(metavar="DIR", help="A folder of pictures, or an index that --out named.")]
Model = Annotated[
    Path | None,
    arg(metavar="BUNDLE", help="A bundle of 'pocketvlm export'; left out: the one that the index remembers."),
]
Backend = Annotated[
    Literal["auto", "onnxruntime", "executorch", "coreml"],
    arg(help="Runtime; auto takes the first that this machine and the bundle both have."),
]
Precision = Annotated[
    str, arg(metavar="NAME", help="fp32, int8 or another that the bundle has; auto takes the most faithful.")
]


def register(app: Any) -> None:
    """Add these commands to the command line."""
    app.command(index)
    app.command(search)


def index(
    folder: Folder,
    *,
    model: Model = None,
    out: Annotated[
        Path | None, arg(metavar="INDEX", help="Where to keep the index; default: a folder in the cache.")
    ] = None,
    dtype: Annotated[
        Literal["f32", "f16", "int8", "binary"], arg(help="How embeddings are stored, where the index is new.")
    ] = "f16",
    dim: Annotated[
        int | None, arg(metavar="N", help="Width of the embeddings of an elastic model, where the index is new.")
    ] = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    overwrite: Annotated[bool, arg(help="Make the index anew.")] = False,
    as_json: Json = False,
) -> None:
    """Embed the pictures under a folder, or what has changed there since, so that 'search' finds them."""
    at = _place(folder, out)
    if overwrite:
        folder, model, backend, precision = _anew(at, folder, model, backend, precision)
    opened, loaded = _open(folder, at, model, backend, precision, dim, dtype)
    with opened:
        report = _sync(opened, loaded, folder)
        facts = {"index": str(at), "rows": len(opened), "model": str((opened.model or {}).get("bundle"))}
        assert report is not None
        if as_json:
            print(json.dumps(facts | vars(report), indent=1))
        else:
            emit_record(facts | {**vars(report), "unreadable": len(report.unreadable)}, title=str(opened.folder))


def search(
    folder: Folder,
    text: Annotated[Positional[str | None], arg(metavar="[TEXT]", help="What the pictures should show.")] = None,
    *,
    image: Annotated[Path | None, arg(metavar="FILE", help="Search with this picture instead of a text.")] = None,
    model: Model = None,
    k: Annotated[int, arg(aliases=["-k"], metavar="N", help="So many pictures.")] = 20,
    where: Annotated[
        tuple[str, ...],
        arg(metavar="FILTER ...", help="Such as 'year>=2024' 'folder=cats'; folder, suffix, bytes, modified, year."),
    ] = (),
    open: Annotated[bool, arg(help="Write an HTML contact sheet and open it in the browser.")] = False,
    sheet: Annotated[
        Path | None, arg(metavar="FILE", help="Where the contact sheet goes; default: search.html in the index.")
    ] = None,
    backend: Backend = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Find pictures under a folder by words or by a picture; indexes the folder first, or what changed since."""
    if (text is None) == (image is None):
        raise UsageError(
            "search takes either a text or --image, not both or neither; for instance: pocketvlm search DIR 'a boat'"
        )
    if sheet is not None and sheet.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--sheet {sheet} does not end in .html, so no browser would show it; name it {sheet}.html")
    if k < 1:
        raise UsageError(f"-k {k} was given and at least 1 is expected; nothing could be found")
    from pocketvlm.edge.index_filter import parse_where
    from pocketvlm.edge.index_lock import NotWritableError

    conditions = parse_where(where)
    at = _place(folder, None)
    opened, loaded = _open(folder, at, model, backend, precision, None, "f16")
    with opened:
        # first, as indexing may take an hour
        query = loaded.embed_text(text) if text is not None else loaded.embed_image(image or "")
        try:
            _sync(opened, loaded, folder)
        except NotWritableError as error:
            print(f"searching what was indexed before: {error}", file=sys.stderr)
        hits = opened.search(query, k, space=loaded, where=conditions)[0]
        rows = [_row(place, hit, opened.folder) for place, hit in enumerate(hits)]
        emit(rows, as_json, title=f"{counted(len(hits), 'picture')} of {len(opened):,}")
        if open or sheet is not None:
            _show(opened, hits, text, image, sheet or at / "search.html", open)


def _row(place: int, hit: Hit, root: Path | None) -> dict[str, Any]:
    path = hit.key if root is None else str(root / hit.key)
    return {"rank": place + 1, "score": round(hit.score, 4), "path": path}


def _show(
    opened: EmbeddingIndex, hits: list[Hit], text: str | None, image: Path | None, sheet: Path, in_browser: bool
) -> None:
    from pocketvlm.contact_sheet import contact_sheet

    if opened.folder is None:
        raise UsageError(f"index {str(opened.path)!r} holds rows of no folder, so there is no picture to show")
    title = text if text is not None else f"like {image.name if image else ''}"
    told = f"{counted(len(hits), 'picture')} of {len(opened):,} in {opened.folder}, by cosine"
    sheet.write_text(
        contact_sheet([(hit.key, hit.score) for hit in hits], opened.folder, title, told, image), encoding="utf-8"
    )
    print(f"contact sheet: {sheet}", file=sys.stderr)
    if in_browser:
        import webbrowser

        if not webbrowser.open(sheet.absolute().as_uri()):
            print("no browser was found here; open that file in one", file=sys.stderr)


def _place(folder: Path, out: Path | None) -> Path:
    """Where the index of a folder lives: where it was put, in the folder given if that is one, else in the cache."""
    import hashlib

    from pocketvlm.data.cache import cache_dir
    from pocketvlm.edge.index import holds_index

    if out is not None:
        return out
    if holds_index(folder):
        return folder
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is no folder and one with pictures is expected; there is nothing to search")
    # outside the folder: that of a camera's card or of another user cannot be written to, and a gallery stays clean
    whole = folder.resolve()
    return cache_dir() / "indexes" / f"{whole.name or 'root'}-{hashlib.sha256(str(whole).encode()).hexdigest()[:12]}"


def _anew(
    at: Path, folder: Path, bundle: Path | None, backend: str, precision: str
) -> tuple[Path, Path | None, Any, str]:
    """Remove the index at `at`; the folder of pictures and the model that it had, where none other is named."""
    from pocketvlm.edge.bundle import Bundle
    from pocketvlm.edge.index import EmbeddingIndex, holds_index

    if not holds_index(at):
        return folder, bundle, backend, precision
    known: Mapping[str, Any] = {}
    pictures = None
    try:
        with EmbeddingIndex.load(at) as old, old._store.writing():  # nobody else writes there
            known, pictures = old.model or {}, old.folder
    except (IntegrityError, VersionError) as error:
        # what cannot be read may be made again, and remembers nothing
        print(f"made anew: {error}", file=sys.stderr)
    others = sorted(path.name for path in at.iterdir() if not _of_index(path))
    if others:
        raise UsageError(
            f"the index {str(at)!r} lies with {others[0]!r}, which is none of its files and would be deleted with it; "
            "move that away first"
        )
    if bundle is None and known:
        bundle = Path(known["bundle"])
        backend = backend if backend != "auto" else known["backend"]
        precision = precision if precision != "auto" else known["precision"]
    if bundle is None:
        raise UsageError(f"the index {str(at)!r} remembers no model and none was given; give --model BUNDLE")
    if holds_index(folder):
        if pictures is None:
            raise UsageError(
                f"index {str(at)!r} names no folder of pictures that it could be made anew from; give that folder, and "
                "--out with the index"
            )
        folder = pictures
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is no folder and one with pictures is expected; the index was left as it is")
    Bundle.load(bundle)  # one that cannot be used is found while the old index is still there
    shutil.rmtree(at)
    return folder, bundle, backend, precision


def _of_index(path: Path) -> bool:
    """Whether it is a file that an index, or `search --open`, writes."""
    own = ("index.sqlite*", "vectors-*.bin", "cache-*", "writer.lock*", "search.html")
    return path.is_file() and any(path.match(pattern) for pattern in own)


def _open(
    folder: Path, at: Path, bundle: Path | None, backend: str, precision: str, dim: int | None, dtype: Any
) -> tuple[EmbeddingIndex, EdgeModel]:
    """The index, made where it is new, and its model, which it remembers."""
    from pocketvlm.edge.index import EmbeddingIndex, holds_index
    from pocketvlm.edge.model import EdgeModel

    opened = EmbeddingIndex.load(at) if holds_index(at) else None
    try:
        known = (opened.model if opened is not None else None) or {}
        remembered = bundle is None
        if bundle is None:
            if not known:
                raise UsageError(
                    f"{str(folder)!r} has no index that remembers a model, and none was given; nothing can be "
                    "embedded, so give --model BUNDLE (a folder or .zip that 'pocketvlm export' wrote) this first time"
                )
            if not Path(known["bundle"]).exists():
                raise UsageError(
                    f"the index {str(at)!r} was made with the bundle {known['bundle']!r}, which is not there any more; "
                    "nothing can be embedded, so give --model BUNDLE with one of the same embedding space"
                )
            bundle = Path(known["bundle"])
            backend = backend if backend != "auto" else known["backend"]
            precision = precision if precision != "auto" else known["precision"]
        width = opened.dim if opened is not None else dim
        space = opened.space_id if opened is not None else None
        loaded = EdgeModel.load(bundle, backend=backend, precision=precision, dim=_own_width(bundle, width, space))  # type: ignore[arg-type]
        if opened is None:
            opened = EmbeddingIndex.create(at, loaded, dtype=dtype)
        elif loaded.contract.space_id != opened.space_id:
            raise UsageError(
                f"the index {str(at)!r} holds embeddings of {opened.space_id!r} and the bundle {str(bundle)!r} gives "
                f"{loaded.contract.space_id!r}; they have no cosine, so make it anew with 'pocketvlm index "
                "--overwrite' or a second one with --out"
            )
        if not remembered:
            opened.remember_model({"bundle": str(bundle.absolute()), "backend": backend, "precision": precision})
    except BaseException:
        if opened is not None:
            opened.close()
        raise
    return opened, loaded


def _own_width(bundle: Path, width: int | None, space: str | None) -> int | None:
    """The width to ask a bundle for; its own where it is of another space, which is refused afterwards."""
    from pocketvlm.edge.bundle import Bundle

    contract = Bundle.load(bundle, verify=False).contract
    return None if space is not None and contract.space_id != space else width


def _sync(opened: EmbeddingIndex, loaded: EdgeModel, folder: Path) -> SyncReport | None:
    """Bring the index up to date, with a bar where there is something to do; None for an index of no folder."""
    from pocketvlm.edge.index import holds_index

    root = opened.folder if holds_index(folder) else folder
    if root is None:
        return None
    with _bar() as progress:
        report = opened.sync_folder(root, loaded, progress=progress)
    if report.unreadable:
        some = list(report.unreadable.items())[:3]
        first = printable("; ".join(f"{path}: {problem.split(';')[0]}" for path, problem in some))
        print(
            f"{counted(len(report.unreadable), 'path')} could not be read and will not be found (all: pocketvlm "
            f"index --json): {first}",
            file=sys.stderr,
        )
    return report


@contextmanager
def _bar() -> Iterator[SyncProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True)
    task = shown.add_task("", total=None)

    def progress(done: int, of: int) -> None:
        shown.start()  # where nothing is to do, nothing is shown
        shown.update(task, completed=done, total=of)

    try:
        yield progress
    finally:
        shown.stop()
