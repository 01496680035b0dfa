"""The largest logits over a list of texts in the teacher cache: exact, cheap, the same bytes after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_build import CacheBuild, build_cache
from pocketvlm.teachers.top_logits import TopLogits, agreement, id_dtype, largest, log_shares, logit_bytes

from .conftest import TinyTeacher

TEXTS = tuple(f"a photo of a {name}" for name in ("cat", "dog", "bus", "tree", "moon", "spoon", "river"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_hand(teacher: TinyTeacher, pixels: torch.Tensor) -> list[float]:
    """Shares of the texts for one picture, in Python's own numbers."""
    image = teacher.encode_images(pixels[None]).embedding[0].tolist()
    texts = teacher.encode_texts(TEXTS).embedding.tolist()
    weights = [math.exp(teacher.logit_scale * math.fsum(a * b for a, b in zip(image, text))) for text in texts]
    return [weight / math.fsum(weights) for weight in weights]


def test_kept_logits_are_the_teachers_largest(samples: list[Sample], folder: Path) -> None:
    teacher = TinyTeacher()
    cache = build_cache(teacher, samples, ["a cat"], folder, shard_size=4, logits=TopLogits(TEXTS, 3))
    assert (cache.info.top_logits, cache.info.logit_count) == (3, 7)
    uids = [sample.uid for sample in samples]
    kept, ids = cache.logits(uids)
    assert kept.shape == (len(uids), 4)
    assert ids.dtype == torch.int64
    for row, sample in enumerate(samples):
        shares = by_hand(teacher, torch.from_numpy(load_image(sample.image.read(), teacher.image)))
        order = sorted(range(len(TEXTS)), key=lambda place: -shares[place])
        assert ids[row].tolist() == order[:3]
        wanted = [*(shares[place] for place in order[:3]), math.fsum(shares[place] for place in order[3:])]
        # float16 rounds a logarithm of up to 8 by 0.002
        assert kept[row].exp().tolist() == pytest.approx(wanted, rel=3e-3)
    # the texts are kept as texts too, so that whoever reads the logits has what they are over
    torch.testing.assert_close(cache.text(TEXTS), teacher.encode_texts(TEXTS).embedding)
    empty, none = cache.logits([])
    assert (empty.shape, none.shape) == ((0, 4), (0, 3))


def test_views_have_logits_of_their_own_and_cost_what_is_told(samples: list[Sample], folder: Path) -> None:
    build = CacheBuild(
        TinyTeacher(), samples, [], folder, views=3, policy=AugmentPolicy(), dtype="bfloat16", features=False,
        logits=TopLogits(TEXTS, 2),
    )  # fmt: skip
    # eight numbers of two bytes, nine of four, and two logits, their rest and two places of two each
    assert build.cost().view == 8 * 2 + 9 * 4 + 10
    cache = build.run()
    assert cache is not None
    stored = 0
    for name in cache.files:
        with safe_open(folder / name, framework="pt") as handle:
            stored += sum(handle.get_tensor(key).nbytes for key in ("logits", "logit_ids"))
    assert stored == len(samples) * 3 * logit_bytes(2, 7) == len(samples) * 3 * 10
    uids = [sample.uid for sample in samples]
    first, second = cache.logits(uids, 0)[0], cache.logits(uids, [1 + place % 2 for place in range(len(uids))])[0]
    assert not torch.equal(first, second)
    assert logit_bytes(0, 0) == 0
    assert (id_dtype(2**16), id_dtype(2**16 + 1)) == (torch.uint16, torch.int32)
    assert logit_bytes(32, 2**16) == 130


def test_a_killed_build_goes_on_to_the_same_bytes(samples: list[Sample], tmp_path: Path) -> None:
    how = {"shard_size": 4, "batch_size": 2, "logits": TopLogits(TEXTS, 3)}
    build_cache(TinyTeacher(), samples, [], tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        build_cache(TinyTeacher(fail_after=7), samples, [], tmp_path / "cut", **how)
    build_cache(TinyTeacher(), samples, [], tmp_path / "cut", **how)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_other_texts_or_another_number_are_refused_and_named(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder, logits=TopLogits(TEXTS, 3))
    with pytest.raises(IntegrityError, match="has top_logits 3 but 4 was expected"):
        build_cache(TinyTeacher(), samples, TEXTS, folder, logits=TopLogits(TEXTS, 4))
    with pytest.raises(IntegrityError, match=r"has texts of the logits '\w{64}' but '\w{64}' was expected"):
        build_cache(TinyTeacher(), samples, TEXTS, folder, logits=TopLogits(TEXTS[::-1], 3))
    with pytest.raises(IntegrityError, match="has number of texts of the logits 7 but 6 was expected"):
        build_cache(TinyTeacher(), samples, TEXTS, folder, logits=TopLogits(TEXTS[:6], 3))
    with pytest.raises(IntegrityError, match="has top_logits 3 but 0 was expected"):
        build_cache(TinyTeacher(), samples, TEXTS, folder)


def test_a_cache_of_the_release_before_is_read(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, [], folder)
    manifest = json.loads((folder / "cache.json").read_text())
    manifest["schema_version"] = "1.2"
    for key in ("top_logits", "logit_count", "logit_texts"):
        del manifest["info"][key]
    (folder / "cache.json").write_text(json.dumps(manifest))
    cache = TeacherCache.open(folder)
    assert cache.image([samples[0].uid]).shape == (1, 8)
    with pytest.raises(UsageError, match="keeps embeddings of 'tiny' and no logits"):
        cache.logits([samples[0].uid])


@pytest.mark.parametrize(
    ("texts", "top", "sentence"),
    [
        (("a", "b", "a"), 1, "have 'a' twice"),
        (("a", " ", "b"), 1, "have ' ' among them, which is empty"),
        (("a", "b"), 2, "the 2 largest of a teacher's logits over 2 texts"),
        (("a", "b"), 0, "the 0 largest .* ask for 1 at least"),
    ],
)
def test_what_cannot_be_kept_is_refused(texts: tuple[str, ...], top: int, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        TopLogits(texts, top)


def test_half_precision_is_fine_where_the_mass_is() -> None:
    """At a logit scale of 100: shares above a thousandth are kept to 0.4 %, as raw logits in float16 would not be."""
    generator = torch.Generator().manual_seed(0)
    image, texts = (
        torch.nn.functional.normalize(torch.randn(rows, 64, generator=generator), dim=1) for rows in (200, 1000)
    )
    shares = log_shares(image, texts, 100.0)
    kept, ids = largest(shares, 32)
    exact = shares.double().gather(1, ids).exp()
    mass = exact > 1e-3
    assert float(((kept[:, :32].double().exp() / exact - 1).abs())[mass].max()) < 0.004
    logits = 100.0 * (image @ texts.T).gather(1, ids)
    assert float(((logits.half().double() - logits.double()).exp() - 1).abs()[mass].max()) > 0.01
    assert float(agreement(kept, ids, shares).min()) > 0.999999
    # the same shares at other texts are another distribution
    assert float(agreement(kept, (ids + 1) % 1000, shares).max()) < 0.99
