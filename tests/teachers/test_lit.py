"""The built-in teacher on a handful of pictures: real encoders, real fit, own cache folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.data.splits import in_pool
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UnknownNameError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers import lit, load_teacher
from pocketvlm.teachers.base import Teacher, TokenTeacher
from pocketvlm.teachers.efficientnet import Lite2
from pocketvlm.teachers.minilm import MiniLM

from .conftest import picture, png


@pytest.fixture(scope="module")
def encoders() -> tuple[Lite2, MiniLM]:
    return Lite2.load(), MiniLM.load()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoders: tuple[Lite2, MiniLM]) -> list[Sample]:
    """Twelve pictures with made-up names instead of OpenMoji, and the encoders read only once."""
    monkeypatch.setattr(Lite2, "load", lambda: encoders[0])
    monkeypatch.setattr(MiniLM, "load", lambda: encoders[1])
    names = ["red", "green", "blue", "black", "white", "yellow", "purple", "orange", "pink", "brown"]
    samples = [
        Sample(
            uid=f"t/{i}",
            image=ImageRef(data=png(picture(i, 64, 64))),
            captions=(Caption(f"{names[i % 10]} thing {i}"),),
            group=f"concept {i}",
        )
        for i in range(12)
    ]
    monkeypatch.setattr(lit, "openmoji_samples", lambda **_: list(samples))
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "pv"))
    return samples


def pixels_of(samples: list[Sample]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(load_image(s.image.read(), lit.IMAGE)) for s in samples])


def test_it_is_built_once_and_read_again(tiny: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, str]] = []
    first = load_teacher("openmoji-lit?fold=0", progress=lambda *c: calls.append(c))
    assert isinstance(first, Teacher)
    assert calls[-1][0] == calls[-1][1]
    files = {p: p.read_bytes() for p in (tmp_path / "pv").rglob("*.safetensors")}
    assert len(files) == 2  # one part of features, one fold

    def refuse(*_: object) -> None:
        raise AssertionError("features were extracted again")

    monkeypatch.setattr(lit, "_extract", refuse)
    again = load_teacher("openmoji-lit")
    assert again.fingerprint == first.fingerprint
    # the features serve every fold, and the fit alone is made anew
    pools = [in_pool(tiny, "teacher", fold) for fold in range(5)]
    differing = next(fold for fold in range(1, 5) if pools[fold] != pools[0])
    other = load_teacher(f"openmoji-lit?fold={differing}")
    assert other.fingerprint != first.fingerprint
    assert all(path.read_bytes() == data for path, data in files.items())


def test_a_rebuild_is_the_same_to_the_bit(tiny: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_teacher("openmoji-lit?fold=2").fingerprint
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "elsewhere"))
    assert load_teacher("openmoji-lit?fold=2").fingerprint == first


def test_outputs_follow_the_definition(tiny: list[Sample]) -> None:
    teacher = lit.load_lit_teacher(0)
    pool = in_pool(tiny, "teacher", 0)
    out = teacher.encode_images(pixels_of(pool))
    assert out.embedding.shape == (len(pool), 384)
    assert out.features is not None
    assert out.features.shape == (len(pool), 1280)
    assert torch.allclose(out.embedding.norm(dim=-1), torch.ones(len(pool)), atol=1e-5)
    texts = teacher.encode_texts([s.captions[0].text for s in pool])
    assert texts.features is not None
    centred = texts.features - texts.features.mean(0)
    assert torch.allclose(texts.embedding, F.normalize(centred, dim=-1), atol=1e-5)
    # outputs may enter a loss: inference tensors could not
    query = torch.ones(1, 384, requires_grad=True)
    ((query @ out.embedding.T).sum() + (query @ texts.embedding.T).sum()).backward()
    assert query.grad is not None
    # pictures that it was fitted on find their own captions
    cosine = out.embedding @ texts.embedding.T
    assert (cosine.argmax(1) == torch.arange(len(pool))).float().mean() > 0.9


def test_it_never_sees_the_other_pools(tiny: list[Sample], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = load_teacher("openmoji-lit?fold=0").fingerprint
    seen = {s.uid for s in in_pool(tiny, "teacher", 0)}
    assert 0 < len(seen) < len(tiny)
    changed = [
        s if s.uid in seen else dataclasses.replace(s, captions=(Caption("nonsense"),), image=tiny[0].image)
        for s in tiny
    ]
    monkeypatch.setattr(lit, "openmoji_samples", lambda **_: changed)
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "two"))
    assert load_teacher("openmoji-lit?fold=0").fingerprint == first


def test_captions_and_pictures_change_the_fingerprint(tiny: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_teacher("openmoji-lit?fold=0").fingerprint
    victim = in_pool(tiny, "teacher", 0)[0]
    for change in ({"captions": (Caption("something else"),)}, {"image": ImageRef(data=png(picture(99)))}):
        changed = [dataclasses.replace(s, **change) if s.uid == victim.uid else s for s in tiny]  # type: ignore[arg-type]
        monkeypatch.setattr(lit, "openmoji_samples", lambda changed=changed, **_: changed)
        assert load_teacher("openmoji-lit?fold=0").fingerprint != first


def test_tokens_are_the_places_of_the_pooled_map(tiny: list[Sample]) -> None:
    for spec in ("openmoji-lit?fold=0", "openmoji-lit?fold=0&precision=bfloat16"):
        teacher = load_teacher(spec)
        assert isinstance(teacher, TokenTeacher)
        plain, found = teacher.encode_images(pixels_of(tiny[:2])), teacher.encode_image_tokens(pixels_of(tiny[:2]))
        assert torch.equal(found.embedding, plain.embedding)
        assert found.taps["tokens"].shape == (2, 25, 1280)
        assert found.taps["tokens"].dtype == torch.float32
        assert plain.features is not None
        # bfloat16 rounds each of 25 places and the mean to eight bits
        torch.testing.assert_close(found.taps["tokens"].mean(dim=1), plain.features, rtol=1e-2, atol=1e-2)


def test_bfloat16_is_near_and_another_teacher(tiny: list[Sample]) -> None:
    full, half = (lit.load_lit_teacher(0, precision=p) for p in lit.PRECISIONS)
    assert full.fingerprint != half.fingerprint
    pixels = pixels_of(tiny[:4])
    cosine = (full.encode_images(pixels).embedding * half.encode_images(pixels).embedding).sum(-1)
    assert 0.95 < cosine.min() < 1


def test_damage_is_noticed(tiny: list[Sample], tmp_path: Path) -> None:
    load_teacher("openmoji-lit?fold=0")
    (path,) = (tmp_path / "pv" / "teachers" / "openmoji-lit").glob("fold0-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="is damaged"):
        load_teacher("openmoji-lit?fold=0")
    path.unlink()
    load_teacher("openmoji-lit?fold=0")


def test_mistakes(tiny: list[Sample]) -> None:
    with pytest.raises(UsageError, match="no fold 5"):
        load_teacher("openmoji-lit?fold=5")
    with pytest.raises(UnknownNameError, match="bfloat16"):
        load_teacher("openmoji-lit?precision=bfloat")
    with pytest.raises(UnknownNameError, match="'fold'"):
        load_teacher("openmoji-lit?flod=1")
    with pytest.raises(BadSampleError, match="empty text"):
        load_teacher("openmoji-lit").encode_texts(["ok", " "])


def test_licences_travel(tiny: list[Sample]) -> None:
    text = " ".join(" ".join(row) for row in load_teacher("openmoji-lit").licences)
    for word in ("CC BY-SA 4.0", "Apache-2.0", "MIT", "OpenMoji", "MiniLM", "EfficientNet-Lite2"):
        assert word in text
