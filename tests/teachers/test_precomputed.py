from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pocketvlm.data.sample import Sample
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.base import Teacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_build import build_cache
from pocketvlm.teachers.precomputed import PrecomputedTeacher, import_embeddings

from .conftest import TinyTeacher

UIDS = ["a", "b", "c"]
TEXTS = ["un chat", "ein Hund"]


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 6)) * 7, rng.normal(size=(2, 6)).astype(np.float16)


def test_arrays_become_a_teacher(arrays: tuple[np.ndarray, np.ndarray], folder: Path) -> None:
    image, text = arrays
    import_embeddings(folder, image=image, uids=UIDS, text=text, texts=TEXTS, name="api", logit_scale=20, logit_bias=-3)
    teacher = load_teacher(f"embeddings:{folder}")
    assert isinstance(teacher, PrecomputedTeacher)
    assert isinstance(teacher, Teacher)
    assert (teacher.dim, teacher.logit_scale, teacher.logit_bias) == (6, 20, -3)
    assert teacher.space_id.startswith("api-")
    expected = image / np.linalg.norm(image, axis=1, keepdims=True)
    assert np.allclose(teacher.cache.image(["c", "a"]).numpy(), expected[[2, 0]], atol=1e-6)
    wide = text.astype(np.float64)
    expected = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    assert np.allclose(teacher.encode_texts(["ein Hund"]).embedding.numpy(), expected[[1]], atol=1e-6)


def test_files_give_the_same_bytes_as_arrays(arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    image, text = arrays
    np.save(tmp_path / "i.npy", image)
    np.save(tmp_path / "t.npy", text)
    (tmp_path / "u.txt").write_text("\n".join(UIDS) + "\n", encoding="utf-8")
    (tmp_path / "t.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    import_embeddings(tmp_path / "a", image=image, uids=UIDS, text=text, texts=TEXTS)
    import_embeddings(
        tmp_path / "b",
        image=tmp_path / "i.npy",
        uids=tmp_path / "u.txt",
        text=tmp_path / "t.npy",
        texts=tmp_path / "t.txt",
    )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["cache.json", "shard-00000.safetensors", "text-00000.safetensors"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_any_teacher_cache_is_a_black_box_teacher(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, ["x"], folder)
    teacher = load_teacher(f"embeddings:{folder}")
    assert teacher.fingerprint == TinyTeacher.fingerprint
    assert torch.allclose(teacher.encode_texts(["x"]).embedding, TinyTeacher().encode_texts(["x"]).embedding)


def test_it_says_what_it_cannot_do(arrays: tuple[np.ndarray, np.ndarray], folder: Path) -> None:
    import_embeddings(folder, image=arrays[0], uids=UIDS)
    teacher = load_teacher(f"embeddings:{folder}")
    with pytest.raises(UsageError, match="cannot embed new pictures"):
        teacher.encode_images(torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
    with pytest.raises(UsageError, match="'ein Hund' is not in the cache"):
        teacher.encode_texts(["ein Hund"])


def test_the_fingerprint_sees_every_input(arrays: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    image, text = arrays
    base = {"image": image, "uids": UIDS, "text": text, "texts": TEXTS}
    changes = [
        {},
        {"image": image + 0.01},
        {"uids": ["a", "c", "b"]},
        {"texts": ["un chien", "ein Hund"]},
        {"logit_scale": 5.0},
        {"image_spec": ImageSpec(size=32)},
    ]
    found = {
        import_embeddings(tmp_path / str(i), **{**base, **change}).info.fingerprint  # type: ignore[arg-type]
        for i, change in enumerate(changes)
    }
    assert len(found) == len(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uids": ["a", "b"]}, "3 image embeddings came with 2 names"),
        ({"uids": ["a", "b", "b"]}, "occur twice"),
        ({"text": np.ones((2, 5))}, "width 6 and text embeddings 5"),
        ({"texts": None}, "come together"),
        ({"image": np.zeros((3, 6))}, "image embedding 0 is zero"),
        ({"image": np.full((3, 6), np.nan)}, "not finite"),
        ({"image": np.ones((3, 6), np.int64)}, "int64"),
        ({"image": np.ones(6)}, r"shape \(6,\)"),
        ({"image": "nowhere.npy"}, "cannot be read"),
        ({"uids": Path("nowhere.txt")}, "cannot be read"),
    ],
)
def test_mistakes(arrays: tuple[np.ndarray, np.ndarray], folder: Path, change: dict[str, object], message: str) -> None:
    arguments = {"image": arrays[0], "uids": UIDS, "text": arrays[1], "texts": TEXTS, **change}
    with pytest.raises(UsageError, match=message):
        import_embeddings(folder, **arguments)  # type: ignore[arg-type]


def test_no_overwriting_unasked(arrays: tuple[np.ndarray, np.ndarray], folder: Path) -> None:
    import_embeddings(folder, image=arrays[0], uids=UIDS)
    with pytest.raises(UsageError, match="overwrite=True"):
        import_embeddings(folder, image=arrays[0], uids=["x", "y", "z"])
    import_embeddings(folder, image=arrays[0], uids=["x", "y", "z"], overwrite=True)
    assert TeacherCache.open(folder).uids == ("x", "y", "z")


def test_pickled_arrays_are_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):
        import_embeddings(tmp_path / "x", image=tmp_path / "i.npy", uids=["a"])
