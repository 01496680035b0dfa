"""Parallel texts: the formats of their lists, what is withheld, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from pocketvlm.data.parallel import english_key, parallel_licences, parallel_texts
from pocketvlm.data.readers.bilingual import associate, glosses, read_annotations, read_dictd
from pocketvlm.edge.errors import UnknownNameError, UsageError

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _base64(number: int) -> str:
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 64)
        digits = _ALPHABET[digit] + digits
    return digits


def write_dictd(folder: Path, name: str, articles: dict[str, str], *, packed: bool = True) -> Path:
    """A dictionary as dictfmt writes it: articles begin with the headword's own line."""
    body, rows = b"", ["00databaseshort\tA\tA"]
    for headword, text in articles.items():
        article = f"{headword} /x/\n{text}\n".encode()
        rows.append(f"{headword}\t{_base64(len(body))}\t{_base64(len(article))}")
        body += article
    folder.mkdir(exist_ok=True)
    index = folder / f"{name}.index"
    index.write_text("\n".join(rows) + "\n", encoding="utf-8")
    if packed:
        index.with_suffix(".dict.dz").write_bytes(gzip.compress(body))
    else:
        index.with_suffix(".dict").write_bytes(body)
    return index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "dictd"
    # the first body is longer than 64 and than 4,096 bytes, so that offsets have one, two and three digits
    long = {f"mot{i}": "x" * 50 for i in range(100)}
    write_dictd(path, "freedict-fra-eng", {"chien": "1. dog, hound\n2. (fam.) cop <n>", **long, "poisson": "fish"})
    write_dictd(path, "freedict-eng-deu", {"to run": "laufen\n         Note: schnell\nrennen"}, packed=False)
    write_dictd(path, "wordnet", {"dog": "an animal"})
    return path


def test_a_folder_of_dictionaries_is_read_in_both_directions(folder: Path) -> None:
    pairs = parallel_texts([f"dictd:{folder}"])
    found = {(p.text, p.english, p.language) for p in pairs if not p.text.startswith("mot")}
    assert found == {
        ("chien", "dog", "fr"), ("chien", "hound", "fr"), ("chien", "cop", "fr"), ("poisson", "fish", "fr"),
        ("laufen", "run", "de"), ("rennen", "run", "de"),
    }  # fmt: skip
    assert {p.language for p in parallel_texts([f"dictd:{folder}"], languages=["de"])} == {"de"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1. platform, quay; wharf", ["platform", "quay", "wharf"]),
        (" [phys.] space-time symmetry <n>", ["space-time symmetry"]),
        ("         Note: at sth. / to sth.", []),
        ("   Synonym: {wharf}", []),
        ("(noun (common) (futsuumeishi))", []),
        ("a long explanation of what it is", []),
    ],
)
def test_glosses_are_short_translations(line: str, expected: list[str]) -> None:
    assert list(glosses([line])) == expected


def test_a_broken_dictionary_is_refused_with_one_sentence(folder: Path, tmp_path: Path) -> None:
    index = folder / "freedict-fra-eng.index"
    with pytest.raises(UsageError, match="does not say which languages"):
        parallel_texts([f"dictd:{folder / 'wordnet.index'}"])
    with pytest.raises(UsageError, match="neither an index of dictd nor a folder"):
        parallel_texts([f"dictd:{tmp_path}"])
    whole = index.read_text(encoding="utf-8")
    index.write_text(whole + "chat\t////\tB\n", encoding="utf-8")
    with pytest.raises(UsageError, match="behind the end of its dictionary"):
        list(read_dictd(index))
    index.write_text(whole + "chat only\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no index of dictd"):
        list(read_dictd(index))
    index.write_text(whole, encoding="utf-8")
    body = index.with_suffix(".dict.dz")
    body.write_bytes(body.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"no readable freedict-fra-eng\.dict\.dz"):
        list(read_dictd(index))


def test_tables_and_cedict(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("Hund\tthe dog\tde\n\nlapin\trabbit\tfr\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "gatto", "en": "cat", "language": "it"}), encoding="utf-8")
    (tmp_path / "c.u8").write_text("# CC-CEDICT\n魚 鱼 [yu2] /fish/CL:條|条[tiao2]/\n", encoding="utf-8")
    (tmp_path / "c.gz").write_bytes(gzip.compress("狗 狗 [gou3] /dog/\n".encode()))
    sources = [
        f"table:{tmp_path}/a.tsv",
        f"table:{tmp_path}/b.jsonl",
        f"cedict:{tmp_path}/c.u8",
        f"cedict:{tmp_path}/c.gz",
    ]
    found = [(p.text, p.english, p.language) for p in parallel_texts(sources)]
    assert found == [
        ("Hund", "dog", "de"), ("lapin", "rabbit", "fr"), ("gatto", "cat", "it"), ("鱼", "fish", "zh"),
        ("狗", "dog", "zh"),
    ]  # fmt: skip
    for bad in ("Hund\tdog\n", "Hund\t\tde\n"):
        (tmp_path / "a.tsv").write_text(bad, encoding="utf-8")
        with pytest.raises(UsageError, match=r"line 1 of a\.tsv is no pair"):
            parallel_texts(sources)
    (tmp_path / "b.jsonl").write_text('{"text": "gatto"', encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 1 of b\.jsonl is no pair"):
        parallel_texts(sources[1:])
    with pytest.raises(UsageError, match="no line of CC-CEDICT"):
        parallel_texts([f"cedict:{tmp_path}/a.tsv"])
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        parallel_texts([f"table:{tmp_path}/absent.tsv"])


def test_captions_of_a_data_set_and_what_is_withheld(tmp_path: Path) -> None:
    rows = []
    for name, german in (("fish", "Fisch"), ("red apple", "roter Apfel"), ("goldfish", "Goldfisch")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{german}.png")
        captions = [{"text": name, "language": "en"}, {"text": german, "language": "de"}]
        rows.append({"image": f"{german}.png", "captions": captions})
    data = tmp_path / "list.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "t.tsv").write_text("Speisefisch\ta fish\tde\nFisch\tPisces\tde\n", encoding="utf-8")
    sources = [f"captions:{data}?caption=captions", f"table:{tmp_path}/t.tsv"]

    def texts(**how: object) -> set[tuple[str, str]]:
        return {(p.text, p.english) for p in parallel_texts(sources, **how)}  # type: ignore[arg-type]

    names = {("Fisch", "fish"), ("roter Apfel", "red apple"), ("Goldfisch", "goldfish")}
    table = {("Speisefisch", "fish"), ("Fisch", "Pisces")}
    assert texts() == names | table
    # names of scored concepts never come from captions; a dictionary's do unless strict
    kept = names - {("Fisch", "fish")}
    assert texts(withheld=["fish", "Fisch"], strict=False) == kept | table
    assert texts(withheld=["The Fish", "Fisch"]) == kept | {("Fisch", "Pisces")}
    assert texts(withheld=["goldfisch"]) == names - {("Goldfisch", "goldfish")} | table


def test_the_most_frequent_english_is_kept_first(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("hund\tdog\tde\nraupenschlepper\tcrawler tractor\tde\nkot\tcat\tpl\n", encoding="utf-8")
    assert [p.text for p in parallel_texts([f"table:{path}"], per_language=1)] == ["hund", "kot"]


def test_keywords_are_paired_by_the_emoji_that_they_share(tmp_path: Path) -> None:
    words = {
        "en": {"🐟": ["fish", "animal"], "🐕": ["dog", "animal"], "🦊": ["fox", "animal"], "🎏": ["fish"]},
        "fr": {"🐟": ["poisson", "animal"], "🐕": ["chien", "animal"], "🦊": ["animal"], "🎏": ["poisson"]},
    }
    for language, table in words.items():
        (tmp_path / language).mkdir()
        value = {"annotations": {"annotations": {emoji: {"default": found} for emoji, found in table.items()}}}
        (tmp_path / language / "annotations.json").write_text(json.dumps(value), encoding="utf-8")
    found = set(read_annotations(tmp_path, dict.fromkeys(words["en"], ""), ["fr"]))
    assert {("poisson", "fish", "fr"), ("animal", "animal", "fr"), ("chien", "dog", "fr")} <= found
    # without the fox and the carp, what is said of them is unknown
    fewer = set(read_annotations(tmp_path, {"🐕": ""}, ["fr"]))
    assert {text for text, _, _ in fewer} == {"chien", "animal"}
    with pytest.raises(UsageError, match="no file of CLDR's annotations"):
        list(read_annotations(tmp_path, {}, ["de"]))
    assert associate({"a": set("12")}, {"b": set("1234567"), "c": set("3")}) == {}


def test_stamps(tmp_path: Path) -> None:
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "k.txt").write_text("A red kangaroo.\nde.utf8=Ein rotes Känguru.\nzh_CN.utf8=红袋鼠。\n")
    found = [(p.text, p.english, p.language) for p in parallel_texts([f"stamps:{tmp_path}"])]
    assert found == [("Ein rotes Känguru", "red kangaroo", "de"), ("红袋鼠", "red kangaroo", "zh")]
    with pytest.raises(UsageError, match="no stamp of Tux Paint"):
        parallel_texts([f"stamps:{tmp_path / 'absent'}"])


def test_names_of_sources(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'dictd'"):
        parallel_texts(["dict:x"])
    with pytest.raises(UsageError, match="name no file"):
        parallel_texts(["dictd:"])
    path = tmp_path / "t.tsv"
    path.write_text("hund\tdog\tde\n")
    with pytest.raises(UsageError, match="hold no pair"):
        parallel_texts([f"table:{path}"], languages=["fr"])
    assert parallel_licences([f"table:{path}", f"table:{path}"])[0][1] == "as its author says"
    assert english_key("To  Run") == english_key("run") == "run"
    assert english_key("a") == "a"
