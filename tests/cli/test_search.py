"""`pocketvlm index` and `search` over a folder of pictures, and the contact sheet."""

from __future__ import annotations

import html.parser
import json
import shutil
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from PIL import Image

from pocketvlm.contact_sheet import contact_sheet

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name, colour in {"red": (250, 9, 9), "trips/green": (9, 250, 9), "trips/blue": (9, 9, 250)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), colour).save(folder / f"{name}.png")
    return folder


def names(out: str) -> list[str]:
    return [Path(row["path"]).name for row in json.loads(out)]


def test_the_first_search_indexes_and_later_ones_remember(cli: Cli, bundle: Path, photos: Path, cache: Path) -> None:
    first = cli("search", photos, "red", "--model", bundle, "-k", 2, "--json")
    assert names(first.out)[0] == "red.png"
    assert len(json.loads(first.out)) == 2
    assert json.loads(first.out)[0].keys() == {"rank", "score", "path"}
    assert [path.name.split("-")[0] for path in (cache / "indexes").iterdir()] == ["photos"]
    assert sorted(path.name for path in photos.iterdir()) == ["red.png", "trips"], "nothing is written beside pictures"
    Image.new("RGB", (30, 30), (240, 30, 30)).save(photos / "rose.png")
    (photos / "red.png").unlink()
    assert names(cli("search", photos, "red", "--json").out)[0] == "rose.png"
    shown = cli("search", photos, "blue").out
    assert "blue.png" in shown
    assert "3 pictures of 3" in shown
    assert names(cli("search", photos, "--image", photos / "trips/green.png", "-k", 1, "--json").out) == ["green.png"]
    assert names(cli("search", photos, "red", "--where", "folder=trips", "bytes>1", "--json").out) in (
        ["green.png", "blue.png"],
        ["blue.png", "green.png"],
    )
    assert names(cli("search", photos, "red", "--where", "bytes<0", "--json").out) == []


def test_index_says_what_it_did(cli: Cli, bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no picture")
    done = cli("index", photos, "--model", bundle, "--out", tmp_path / "mine.index", "--dtype", "int8", "--json")
    facts = json.loads(done.out)
    assert (facts["found"], facts["added"], facts["rows"]) == (4, 3, 3)
    assert list(facts["unreadable"]) == ["broken.jpg"]
    assert "1 path could not be read" in done.err
    shown = cli("index", photos, "--out", tmp_path / "mine.index")
    assert "unchanged   3" in shown.out
    # an index is a folder to search in as well
    assert names(cli("search", tmp_path / "mine.index", "red", "-k", 1, "--json").out) == ["red.png"]
    again = json.loads(
        cli("index", photos, "--out", tmp_path / "mine.index", "--model", bundle, "--overwrite", "--json").out
    )
    assert again["added"] == 3
    # made anew by its own name: the folder and the model are what it remembers
    assert json.loads(cli("index", tmp_path / "mine.index", "--overwrite", "--json").out)["added"] == 3


def test_overwrite_deletes_an_index_and_nothing_else(cli: Cli, bundle: Path, photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine.index"
    assert cli("index", photos, "--model", bundle, "--out", place).code == 0
    (place / "notes.txt").write_text("mine")
    told = cli("index", photos, "--out", place, "--overwrite").sentence()
    assert "'notes.txt', which is none of its files" in told
    assert (place / "notes.txt").read_text() == "mine"
    (place / "notes.txt").unlink()
    # a bundle that cannot be used is found before anything is removed
    assert "has no bundle.json" in cli("index", photos, "--out", place, "--model", tmp_path, "--overwrite").sentence()
    assert names(cli("search", place, "red", "-k", 1, "--json").out) == ["red.png"]
    # one that is damaged cannot be searched, and can be made again
    (place / "vectors-0.bin").write_bytes(b"")
    assert "cut short" in cli("search", place, "red").sentence()
    assert "remembers no model" in cli("index", photos, "--out", place, "--overwrite").err
    assert "names no folder" in cli("index", place, "--model", bundle, "--overwrite").err
    done = cli("index", photos, "--out", place, "--model", bundle, "--overwrite", "--json")
    assert "cut short" in done.err
    assert json.loads(done.out)["added"] == 3


def test_a_question_that_cannot_be_asked_is_refused_before_indexing(
    cli: Cli, bundle: Path, photos: Path, cache: Path, edge_toys: Any
) -> None:
    assert "does not exist" in cli("search", photos, "--image", "gone.png", "--model", bundle).sentence()
    assert "at least 1" in cli("search", photos, "red", "-k", 0, "--model", bundle).sentence()
    # both before the folder was looked at
    assert json.loads(cli("index", photos, "--model", bundle, "--json").out)["added"] == 3


def test_mistakes(cli: Cli, bundle: Path, photos: Path, tmp_path: Path, edge_toys: Any) -> None:
    assert "no index that remembers a model" in cli("search", photos, "red").sentence()
    assert "either a text or --image" in cli("search", photos).sentence()
    assert "either a text or --image" in cli("search", photos, "x", "--image", "y.png").sentence()
    assert "is no folder" in cli("search", tmp_path / "nowhere", "x", "--model", bundle).sentence()
    assert "has no operator" in cli("search", photos, "x", "--model", bundle, "--where", "year").sentence()
    assert "does not end in .html" in cli("search", photos, "x", "--model", bundle, "--sheet", "x.png").sentence()
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "index"
    assert "an index cannot be made" in cli("index", photos, "--model", bundle, "--out", out).sentence()

    kept = tmp_path / "kept"
    moved = tmp_path / "moved"
    shutil.copytree(bundle, moved)
    assert cli("index", photos, "--model", moved, "--out", kept).code == 0
    shutil.rmtree(moved)
    assert "is not there any more" in cli("search", kept, "red").sentence()
    assert cli("search", kept, "red", "--model", bundle).code == 0
    other = edge_toys.write_bundle(tmp_path / "other")
    contract = edge_toys.make_contract(other, space_id="elsewhere").to_dict()
    edge_toys.write_manifest(other, contract=contract)
    assert "gives 'elsewhere'; they have no cosine" in cli("search", kept, "red", "--model", other).sentence()


def test_open_shows_a_sheet(cli: Cli, bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    done = cli("search", photos, "red", "--model", bundle, "--open")
    assert done.code == 0
    page = Path(unquote(urlparse(opened[0]).path))
    assert f"contact sheet: {page}" in done.err
    assert page.read_text().count("<img ") == 3
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert "no browser was found" in cli("search", photos, "red", "--open").err


class _Page(html.parser.HTMLParser):
    """Elements and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_names_of_files_are_text_and_nothing_is_fetched(tmp_path: Path) -> None:
    name = "<img src=x onerror=\"alert(1)\">&amp; 'q'#%20?.png"
    Image.new("RGBA", (600, 300), (9, 200, 9, 99)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"x")
    title = "</title><script>alert(2)</script>"
    found = [(name, 0.5), ("broken.png", 0.25), ("gone/gone.png", -0.1)]
    text = contact_sheet(found, tmp_path, title, "3 of 9", tmp_path / name)
    page = _Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("img") == 2, "one card, and the picture that was searched with"
    assert "script" not in tags
    assert {name, title, "0.500", "0.250", "-0.100", "gone"} <= set(page.words)
    assert page.words.count("cannot be read any more") == 2
    for tag, values in page.elements:
        if tag == "img":
            assert (values["src"] or "").startswith("data:image/webp;base64,")
        assert not any(key.startswith("on") for key in values)
    links = [values["href"] or "" for tag, values in page.elements if tag == "a"]
    assert Path(unquote(urlparse(links[0]).path)) == tmp_path / name
    assert "default-src 'none'" in text
    assert "http:" not in text
    assert "https:" not in text
    assert len(text) < 40_000


def test_a_sheet_of_nothing(tmp_path: Path) -> None:
    assert "<li>" not in contact_sheet([], tmp_path, "x", "0 pictures")
