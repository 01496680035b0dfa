"""Found pictures as one page of HTML that needs nothing beside itself: thumbnails, scores, paths; light and dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from pocketvlm.edge.errors import PocketvlmError
from pocketvlm.edge.preprocess import ImageSource, decode_image

_SIDE = 320  # pixels of a thumbnail's longer side

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --page: #f5f5f3; --card: #fff; --edge: #dcdcd8; --ink: #1b1b19; --soft: #5c5c57;
  --bar: #2f6fde; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #161615; --card: #212120; --edge: #363634; --ink: #f0f0ec;
  --soft: #a9a9a3; --bar: #7fb0ff; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; padding: 1.5rem clamp(1rem, 4vw, 3rem) 3rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }}
header {{ display: flex; gap: 1rem; align-items: center; margin-bottom: 1.25rem; }}
header img {{ width: 5rem; height: 5rem; object-fit: contain; border-radius: .5rem; background: #fff; }}
h1 {{ font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: .15rem 0 0; color: var(--soft); overflow-wrap: anywhere; }}
ol {{ list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(11rem, 100%), 1fr)); }}
li {{ background: var(--card); border: 1px solid var(--edge); border-radius: .6rem; overflow: hidden; }}
a {{ color: inherit; text-decoration: none; display: block; }}
a:hover .name, a:focus-visible .name {{ text-decoration: underline; }}
a:focus-visible {{ outline: 3px solid var(--bar); outline-offset: -3px; }}
.frame {{ aspect-ratio: 1; background: var(--edge); display: grid; place-items: center; overflow: hidden; }}
.frame img {{ width: 100%; height: 100%; object-fit: contain; }}
.frame span {{ padding: 1rem; text-align: center; font-size: .85rem; }}
.text {{ padding: .55rem .7rem .7rem; }}
.name {{ font-weight: 600; overflow-wrap: anywhere; }}
.folder, .score {{ color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }}
.score {{ display: flex; gap: .5rem; align-items: center; font-variant-numeric: tabular-nums; }}
.score i {{ flex: 1; height: .3rem; border-radius: .2rem; background: var(--edge); overflow: hidden; }}
.score b {{ display: block; height: 100%; background: var(--bar); }}
</style>
</head>
<body>
<header>{picture}<div><h1>{title}</h1><p>{subtitle}</p></div></header>
<main><ol>
{cards}
</ol></main>
</body>
</html>
"""
_CARD = """<li><a href="{link}"><div class="frame">{picture}</div><div class="text"><div class="name">{name}</div>
<div class="folder">{folder}</div><div class="score">{score:.3f}<i><b style="width:{share:.0f}%"></b></i></div></div>
</a></li>"""


def contact_sheet(
    found: Sequence[tuple[str, float]], folder: Path, title: str, subtitle: str, asked: Path | None = None
) -> str:
    """The page.

    found: paths under `folder` with their cosines, best first; bars are as long as a score is beside the best one's.
    asked: the picture that was searched with.
    """
    best = max((score for _, score in found), default=1.0)
    cards = [
        _CARD.format(
            link=html.escape((folder / name).as_uri()),
            picture=_thumbnail(folder / name, name),
            name=html.escape(Path(name).name),
            folder=html.escape(Path(name).parent.as_posix() if "/" in name else ""),
            score=score,
            share=100 * min(1.0, max(0.0, score / best)) if best > 0 else 0,
        )
        for name, score in found
    ]
    return _PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        picture="" if asked is None else _thumbnail(asked, "the picture that was searched with"),
        cards="\n".join(cards),
    )


def _thumbnail(source: Path, name: str) -> str:
    try:
        image = Image.fromarray(decode_image(_source(source)))
    except (PocketvlmError, OSError):
        return "<span>cannot be read any more</span>"
    image.thumbnail((_SIDE, _SIDE))
    file = BytesIO()
    image.save(file, "WEBP", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/webp;base64,{data}">'


def _source(path: Path) -> ImageSource:
    return path.read_bytes()
