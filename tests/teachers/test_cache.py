from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketvlm.data.augment import AugmentPolicy, apply_view, view_params
from pocketvlm.data.sample import ImageRef, Sample
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError, VersionError
from pocketvlm.edge.preprocess import decode_image, load_image
from pocketvlm.teachers.base import Teacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_build import build_cache

from .conftest import TinyTeacher, make_samples

TEXTS = ["a cat", "a dog", "a cat", "three birds"]
POLICY = AugmentPolicy()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_the_fake_is_a_teacher(tiny_teacher: TinyTeacher) -> None:
    assert isinstance(tiny_teacher, Teacher)


def test_rows_are_the_teachers_outputs(tiny_teacher: TinyTeacher, samples: list[Sample], folder: Path) -> None:
    cache = build_cache(
        tiny_teacher, samples, TEXTS, folder, views=3, policy=POLICY, seed=5, shard_size=4, batch_size=6
    )
    assert cache.uids == tuple(s.uid for s in samples)
    assert cache.texts == ("a cat", "a dog", "three birds")
    sample = samples[6]
    plain = load_image(sample.image.read(), tiny_teacher.image)
    drawn = apply_view(decode_image(sample.image.read()), view_params(sample.uid, 2, 5, POLICY), 16)
    for view, pixels in ((0, plain), (2, drawn)):
        expected = tiny_teacher.encode_images(torch.from_numpy(pixels)[None])
        assert torch.allclose(cache.image([sample.uid], view), expected.embedding, atol=1e-6)
        assert expected.features is not None
        assert torch.allclose(cache.features([sample.uid], [view]), expected.features, atol=1e-6)
    assert torch.allclose(
        cache.text(["three birds", "a cat"]), tiny_teacher.encode_texts(["three birds", "a cat"]).embedding
    )
    assert cache.image([], 0).shape == (0, 8)
    mixed = cache.image(["p/3", "p/0"], [1, 2])
    assert torch.equal(mixed[0], cache.image(["p/3"], 1)[0])
    assert torch.equal(mixed[1], cache.image(["p/0"], 2)[0])


def test_two_builds_give_the_same_bytes(samples: list[Sample], tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_cache(TinyTeacher(), samples, TEXTS, tmp_path / name, views=2, policy=POLICY, shard_size=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "build.json" not in contents(tmp_path / "one")


def test_a_killed_build_resumes_to_the_same_bytes(samples: list[Sample], tmp_path: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, tmp_path / "whole", shard_size=4, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        build_cache(TinyTeacher(fail_after=7), samples, TEXTS, tmp_path / "cut", shard_size=4, batch_size=2)
    with pytest.raises(UsageError, match="unfinished"):
        TeacherCache.open(tmp_path / "cut")
    again = TinyTeacher()
    build_cache(again, samples, TEXTS, tmp_path / "cut", shard_size=4, batch_size=2)
    # the first shard of four was kept; one probe picture asks the teacher for its widths
    assert again.seen == len(samples) - 4 + 1
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_a_build_that_another_process_finishes_meanwhile_is_no_error(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`build.json` is seen, and gone when it is read."""
    with pytest.raises(KeyboardInterrupt):
        build_cache(TinyTeacher(fail_after=7), samples, TEXTS, tmp_path, shard_size=4, batch_size=2)
    real = Path.read_text

    def vanishing(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "build.json":
            self.unlink(missing_ok=True)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", vanishing)
    assert len(build_cache(TinyTeacher(), samples, TEXTS, tmp_path, shard_size=4, batch_size=2)) == len(samples)


def test_a_finished_cache_is_reused(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder)
    again = TinyTeacher()
    build_cache(again, samples, TEXTS, folder)
    assert again.seen == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "0" * 64}, "teacher fingerprint"),
        ({"logit_scale": 11.0}, "logit_scale"),
        (
            {"image": dataclasses.replace(TinyTeacher.image, filter="bicubic")},
            r"preprocessing\.filter 'bilinear' but 'bicubic'",
        ),
    ],
)
def test_another_teacher_is_refused_by_name(
    samples: list[Sample], folder: Path, change: dict[str, object], named: str
) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder)
    other = TinyTeacher()
    for key, value in change.items():
        setattr(other, key, value)
    with pytest.raises(IntegrityError, match=named):
        build_cache(other, samples, TEXTS, folder)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"views": 3, "policy": POLICY}, "views"),
        ({"views": 2, "policy": POLICY, "seed": 1}, "seed"),
        ({"views": 2, "policy": AugmentPolicy(flip=0.0)}, r"policy\.flip"),
        ({"views": 2, "policy": POLICY, "dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_arguments_are_refused_by_name(
    samples: list[Sample], folder: Path, arguments: dict[str, object], named: str
) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder, views=2, policy=POLICY)
    with pytest.raises(IntegrityError, match=rf"has {named} "):
        build_cache(TinyTeacher(), samples, TEXTS, folder, **arguments)  # type: ignore[arg-type]


def test_other_inputs_are_refused_also_while_unfinished(samples: list[Sample], folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_cache(TinyTeacher(fail_after=4), samples, TEXTS, folder, shard_size=4, batch_size=2)
    with pytest.raises(IntegrityError, match="set of images"):
        build_cache(TinyTeacher(), samples[:-1], TEXTS, folder, shard_size=4, batch_size=2)
    with pytest.raises(IntegrityError, match="batch_size"):
        build_cache(TinyTeacher(), samples, TEXTS, folder, shard_size=4, batch_size=3)


def test_expectations_at_open(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder)
    assert len(TeacherCache.open(folder, expect_fingerprint="f" * 64, views=1, seed=0, policy=None)) == len(samples)
    with pytest.raises(IntegrityError, match="teacher fingerprint 'ffff"):
        TeacherCache.open(folder, expect_fingerprint="e" * 64)
    with pytest.raises(IntegrityError, match="views 1 but 4"):
        TeacherCache.open(folder, views=4)


@pytest.mark.parametrize("file", ["shard-00001.safetensors", "text-00000.safetensors"])
def test_changed_and_missing_shards_are_refused(samples: list[Sample], folder: Path, file: str) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder, shard_size=4)
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(bytes(data))
    cache = TeacherCache.open(folder)
    # the damage lies elsewhere
    assert cache.image(["p/0"]).shape == (1, 8)
    for read in (cache.load, cache.check, lambda: cache.image(["p/5"]) if "shard" in file else cache.text(["a cat"])):
        with pytest.raises(IntegrityError, match=rf"{file} has sha256"):
            read()
    (folder / file).unlink()
    with pytest.raises(IntegrityError, match=rf"{file} is listed"):
        TeacherCache.open(folder).check()
    with pytest.raises(IntegrityError, match=rf"{file} cannot be read"):
        TeacherCache.open(folder).load()


def test_a_name_that_a_flipped_bit_changed_is_damage_and_not_absence(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder)
    path = folder / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"p/7", b"p/?"))
    with pytest.raises(IntegrityError, match="has sha256"):
        TeacherCache.open(folder).image(["p/7"])


def test_newer_schema_is_refused(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder)
    manifest = json.loads((folder / "cache.json").read_text())
    for version in ("1.7", "2.0", "none"):
        (folder / "cache.json").write_text(json.dumps({**manifest, "schema_version": version}))
        with pytest.raises(VersionError, match="upgrade"):
            TeacherCache.open(folder)


def test_bfloat16_is_rounded_and_half_the_size(samples: list[Sample], tmp_path: Path) -> None:
    wide = build_cache(TinyTeacher(), samples, TEXTS, tmp_path / "f32", shard_size=1000)
    half = build_cache(TinyTeacher(), samples, TEXTS, tmp_path / "bf16", shard_size=1000, dtype="bfloat16")
    uids = list(wide.uids)
    assert half.image(uids).dtype == torch.float32
    assert torch.equal(half.image(uids), wide.image(uids).bfloat16().float())
    assert not torch.equal(half.image(uids), wide.image(uids))


def test_bad_pictures_are_refused_or_left_out(tmp_path: Path) -> None:
    good = make_samples(4)
    broken = Sample(uid="broken", image=ImageRef(data=good[0].image.read()[:60]))
    gone = Sample(uid="gone", image=ImageRef(path=tmp_path / "nowhere.png"))
    everything = [good[0], broken, good[1], gone, *good[2:]]
    with pytest.raises(BadSampleError):
        build_cache(TinyTeacher(), everything, [], tmp_path / "strict")
    cache = build_cache(TinyTeacher(), everything, [], tmp_path / "loose", on_bad_sample="skip", shard_size=2)
    assert cache.uids == tuple(s.uid for s in good)
    assert cache.skipped == {"broken": "truncated-image", "gone": "missing-file"}
    with pytest.raises(UsageError, match=r"image 'gone' is not in the cache .*missing-file"):
        cache.image(["gone"])
    again = TinyTeacher()
    build_cache(again, everything, [], tmp_path / "loose", on_bad_sample="skip", shard_size=2)
    assert again.seen == 1


def test_lookup_mistakes(samples: list[Sample], folder: Path) -> None:
    cache = build_cache(TinyTeacher(), samples, TEXTS, folder)
    with pytest.raises(UsageError, match="text 'a cow' is not in the cache"):
        cache.text(["a cow"])
    with pytest.raises(UsageError, match="view 1 was asked for"):
        cache.image(["p/0"], 1)
    with pytest.raises(UsageError, match="2 uids came with 1 view"):
        cache.image(["p/0", "p/1"], [0])
    with pytest.raises(UsageError, match="gave no pooled text features"):
        cache.text_features(["a cat"])


def test_request_mistakes(samples: list[Sample], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images and no texts"):
        build_cache(TinyTeacher(), [], [], folder)
    with pytest.raises(UsageError, match=r"'p/0' occurs more than once"):
        build_cache(TinyTeacher(), [samples[0], samples[0]], [], folder)
    with pytest.raises(UsageError, match="views=2"):
        build_cache(TinyTeacher(), samples, [], folder, views=2)
    with pytest.raises(UsageError, match="float16"):
        build_cache(TinyTeacher(), samples, [], folder, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is not a teacher cache"):
        TeacherCache.open(tmp_path)


def test_width_mismatch_and_nan_are_refused(samples: list[Sample], folder: Path) -> None:
    teacher = TinyTeacher()
    teacher.letters = teacher.letters[:, :6]
    with pytest.raises(UsageError, match=r"dim 8 .* \[8, 6\]"):
        build_cache(teacher, samples, TEXTS, folder)
    teacher = TinyTeacher()
    teacher.weight[0, 0] = float("nan")
    with pytest.raises(IntegrityError, match="non-finite"):
        build_cache(teacher, samples, [], folder)


def test_changed_pictures_are_found(samples: list[Sample], folder: Path) -> None:
    cache = build_cache(TinyTeacher(), samples, [], folder)
    assert cache.changed(samples) == []
    other = dataclasses.replace(samples[3], image=samples[4].image)
    assert cache.changed([samples[0], other]) == ["p/3"]


def test_progress_counts_up(samples: list[Sample], folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    build_cache(TinyTeacher(), samples, TEXTS, folder, shard_size=4, progress=lambda *c: calls.append(c))
    images = [c[0] for c in calls if c[2] == "teacher images"]
    assert images == sorted(images)
    assert images[-1] == 11
    assert (3, 3, "teacher texts") in calls
