"""Hard negatives: near to a true caption, false by construction, the same on every machine."""

from __future__ import annotations

import colorsys
import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.data import Caption, DataSource, HardNegative, ImageRef, Sample, contrasts
from pocketvlm.data.hard_negatives import with_hard_negatives
from pocketvlm.data.openmoji import _names
from pocketvlm.edge.tokenizer import Tokenizer


def picture(*colours: tuple[int, int, int]) -> ImageRef:
    buffer = io.BytesIO()
    pixels = np.array([colours], np.uint8).repeat(4, axis=0)
    Image.fromarray(pixels).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


GREY = picture((128, 128, 128))


def made(*captions: str | tuple[str, ...], image: ImageRef = GREY, also: str = "") -> dict[str, str]:
    """Kind -> text of the first sample, in data that also has a sample captioned `also`."""
    groups = [(c,) if isinstance(c, str) else c for c in captions]
    samples = [Sample(f"u{i}", image, tuple(Caption(text) for text in texts)) for i, texts in enumerate(groups)]
    source = DataSource("toy", [*samples, Sample("also", GREY, (Caption(also or "x"),))])
    return {negative.kind: negative.text for negative in with_hard_negatives(source)[0].hard_negatives}


@pytest.fixture(scope="module")
def names() -> DataSource:
    """Every name of the built-in set, over one grey picture."""
    samples = []
    for stem, by_language in _names().items():
        if "skin tone" not in by_language["en"]:
            captions = (Caption(by_language["en"]), Caption(by_language["de"], "de"))
            samples.append(Sample(stem, GREY, captions, label=by_language["en"]))
    return with_hard_negatives(DataSource("names", samples))


def test_replacements_change_one_word_for_one_that_excludes_it(names: DataSource) -> None:
    vocabulary = {word.lower() for s in names for c in s.captions if c.language == "en" for word in c.text.split()}
    tables = {
        "replace_attribute": contrasts._ATTRIBUTES,
        "replace_person": contrasts._PEOPLE,
        "replace_object": contrasts._OBJECTS,
        "replace_action": contrasts._ACTIONS,
    }
    seen: Counter[str] = Counter()
    for sample in names:
        for negative in sample.hard_negatives:
            seen[negative.kind] += 1
            assert negative.caption == sample.captions[0].text
            if negative.kind not in tables:
                continue
            before, after = negative.caption.split(), negative.text.split()
            changed = [(a.lower(), b.lower()) for a, b in zip(before, after, strict=True) if a != b]
            assert len(changed) == 1, negative
            old, new = changed[0]
            assert new in vocabulary
            assert any({old, new} <= {w for family in table for w in family} for table in tables[negative.kind])
            for table in tables[negative.kind]:
                # one contrast in which nothing holds both is enough; none may hold both in a family
                assert not any({old, new} <= set(family) for family in table), negative
    assert seen["replace_attribute"] > 200
    assert seen["replace_object"] > 500
    assert min(seen[kind] for kind in ("replace_person", "replace_action", "swap_object", "word_order")) > 20


def test_no_negative_is_a_name_of_its_picture_and_none_denies(names: DataSource) -> None:
    for sample in names:
        own = {caption.text.casefold().replace(" ", "") for caption in sample.captions}
        words = set(sample.captions[0].text.lower().split())
        for negative in sample.hard_negatives:
            assert negative.text.casefold().replace(" ", "") not in own
            assert not words & {"no", "not", "without"}
            if negative.kind in ("swap_attribute", "swap_object", "word_order"):
                assert sorted(negative.text.lower().split()) == sorted(negative.caption.lower().split())
            if negative.kind == "word_order":
                assert negative.text.lower().split() == negative.caption.lower().split()[::-1]
            if negative.kind == "add_attribute":
                assert [w for w in negative.text.split() if w in negative.caption.split()] == negative.caption.split()


def test_choices_depend_on_the_picture_and_not_on_the_order(names: DataSource) -> None:
    plain = [Sample(s.uid, s.image, s.captions, label=s.label) for s in reversed(names.samples)]
    again = {s.uid: s.hard_negatives for s in with_hard_negatives(DataSource("other", plain))}
    assert again == {s.uid: s.hard_negatives for s in names}
    picked = {s.hard_negatives[0].text for s in names if s.hard_negatives and s.label in ("red heart", "red circle")}
    assert len(picked) == 2


def test_what_is_true_of_a_picture_is_never_put_in() -> None:
    assert made("a dog", also="a cat") == {"replace_object": "a cat"}
    assert made(("a dog", "a cat"), also="a rabbit")["replace_object"] == "a rabbit"
    # a picture that shares a caption may show the same
    assert made("a dog", ("a dog", "a cat")) == {}
    assert made("no dog", also="cat") == {}
    assert made("a dog and a dog", also="a cat") == {}
    # words for more general things, and near ones, stay true
    assert made("a person", also="a man woman child") == {}
    assert made("tiger face", also="cat lion") == {"word_order": "face tiger"}
    assert made("two dogs", also="one three") == {"replace_attribute": "three dogs"}
    assert made("twelve dogs", also="one three") == {}


def test_articles_follow_the_new_word() -> None:
    assert made("an apple on a plate.", also="banana")["replace_object"] == "a banana on a plate."
    assert made("A cat sleeps", also="elephant")["replace_object"] == "An elephant sleeps"
    assert made("an elephant", also="red")["add_attribute"] == "a red elephant"


def test_swaps_need_sides_that_cannot_change_places() -> None:
    assert made("a black cat on a white mat")["swap_attribute"] == "a white cat on a black mat"
    assert "swap_attribute" not in made("a black and white cat")
    assert "swap_attribute" not in made("a black cat on a white cat")
    assert made("left arrow above right hand")["swap_attribute"] == "right arrow above left hand"
    assert "swap_attribute" not in made("arrow pointing left and right")
    assert made("sun behind small cloud")["swap_object"] == "small cloud behind sun"
    assert made("a man riding a horse")["swap_object"] == "a horse riding a man"
    assert "swap_object" not in made("turban wearing man")
    assert "swap_object" not in made("heart with arrow")
    assert "swap_object" not in made("man and woman in bed")


def test_names_that_read_backwards_are_not_reversed() -> None:
    assert made("dog face")["word_order"] == "face dog"
    for name in ("woman running", "man bald", "red heart", "bow and arrow", "heart with arrow", "light bulb"):
        assert "word_order" not in made(name), name


def hue_names(image: ImageRef) -> set[str]:
    """Colour names by their place on the hue circle, pixel by pixel."""
    found = set()
    assert image.data is not None
    for r, g, b in np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB")).reshape(-1, 3).tolist():
        hue, saturation, _ = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        degrees = 360 * hue
        if saturation > 0.3:
            found |= {name for name, at in (("red", 0), ("yellow", 58), ("green", 120), ("blue", 220), ("purple", 290))
                      if min(abs(degrees - at), 360 - abs(degrees - at)) < 20}  # fmt: skip
    return found


@pytest.mark.parametrize("seed", range(12))
def test_an_added_colour_is_in_no_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    colours = [tuple(int(255 * v) for v in colorsys.hsv_to_rgb(h, 0.8, 0.9)) for h in rng.random(2)]
    image = picture(*colours)  # type: ignore[arg-type]
    samples = [Sample(f"{seed}/{i}", image, (Caption("dog face"),)) for i in range(20)]
    also = Sample("also", GREY, (Caption("red yellow green blue purple"),))
    found = {
        negative.text.split()[0]
        for sample in with_hard_negatives(DataSource("toy", [*samples, also]))
        for negative in sample.hard_negatives
        if negative.kind == "add_attribute"
    }
    assert found
    assert not found & hue_names(image)


def test_a_picture_that_cannot_be_read_gets_no_colour() -> None:
    broken = ImageRef(data=b"\xff\xd8\xff\xe0 no")
    assert made("dog face", image=broken, also="red") == {"word_order": "face dog"}
    assert "add_attribute" in made("dog face", also="red")


def test_given_ones_stay_and_other_languages_have_none() -> None:
    given = (HardNegative("a dog", "a cat", "mine"),)
    source = DataSource("toy", [Sample("a", GREY, (Caption("a dog"),), hard_negatives=given)])
    assert with_hard_negatives(source) is source
    german = DataSource("toy", [Sample("a", GREY, (Caption("red dog", "de"),)), Sample("b", GREY, (Caption("cat"),))])
    assert with_hard_negatives(german)[0].hard_negatives == ()


def test_those_that_a_text_tower_would_cut_are_left_out() -> None:
    class Words:
        class spec:
            context_length = 3

        def lengths(self, texts: Any) -> list[int]:
            return [len(text.split()) for text in texts]

    given = (HardNegative("a dog", "a very long cat", "add"), HardNegative("a dog", "a cat", "replace"))
    source = DataSource("toy", [Sample("a", GREY, (Caption("a dog"),), hard_negatives=given)])
    tokenizer: Tokenizer = Words()  # type: ignore[assignment]
    found = source.within_context(tokenizer)
    assert found[0].hard_negatives == given[1:]
    assert found.report.counts == {"too-long-text": 1}
