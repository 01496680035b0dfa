"""Token maps in the teacher cache: averaged to one grid, kept beside the embeddings, refused where there are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers.base import TeacherOutput, TokenTeacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_build import build_cache
from pocketvlm.teachers.tokens import on_grid, token_bytes, token_shape

from .conftest import TinyTeacher


class TinyTokenTeacher(TinyTeacher):
    """Its tokens are the sixteen cells of 4 x 4 pixels: their mean colour, a corner and a made-up number."""

    def encode_image_tokens(self, pixels: torch.Tensor) -> TeacherOutput:
        cells = pixels.float().unflatten(1, (4, 4)).unflatten(3, (4, 4)) / 255  # [B, 4, 4, 4, 4, 3]
        means, corner = cells.mean(dim=(2, 4)).flatten(1, 2), cells[:, :, 0, :, 0].flatten(1, 2)
        output = self.encode_images(pixels)
        return TeacherOutput(output.embedding, output.features, {"tokens": torch.cat([means, corner], dim=2)})

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        output = super().encode_texts(texts)
        return TeacherOutput(output.embedding, output.embedding[:, :3])


def test_on_grid_averages_neighbouring_places() -> None:
    tokens = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    found = on_grid(tokens, 2)
    for row in range(2):
        for column in range(2):
            cells = [4 * (2 * row + a) + 2 * column + b for a in range(2) for b in range(2)]
            torch.testing.assert_close(found[:, 2 * row + column], tokens[:, cells].mean(dim=1))
    assert on_grid(tokens, 4) is tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_tokens_are_the_teachers(samples: list[Sample], folder: Path, dtype: str) -> None:
    teacher = TinyTokenTeacher()
    assert isinstance(teacher, TokenTeacher)
    cache = build_cache(
        teacher,
        samples,
        ["a cat"],
        folder,
        views=2,
        policy=AugmentPolicy(),
        shard_size=4,
        dtype=dtype,  # type: ignore[arg-type]
        token_grid=2,
    )
    assert (cache.info.token_grid, cache.info.token_dim) == (2, 6)
    pixels = torch.from_numpy(load_image(samples[6].image.read(), teacher.image))[None]
    expected = on_grid(teacher.encode_image_tokens(pixels).taps["tokens"], 2)
    found = cache.tokens([samples[6].uid])
    assert found.shape == (1, 4, 6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.to(getattr(torch, dtype)).float())
    assert not torch.equal(cache.tokens([samples[6].uid], 1), found)
    assert cache.tokens([]).shape == (0, 4, 6)
    # embeddings do not change because tokens are kept
    torch.testing.assert_close(
        cache.image([samples[6].uid]),
        teacher.encode_images(pixels).embedding.to(getattr(torch, dtype)).float(),
        atol=1e-6,
        rtol=0,
    )
    stored = 0
    for path in folder.glob("shard-*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            tokens = handle.get_tensor("tokens")
            stored += tokens.numel() * tokens.itemsize
    assert stored == token_bytes(len(samples), 2, *token_shape(teacher, 2), dtype)


def test_a_killed_build_with_tokens_resumes_to_the_same_bytes(samples: list[Sample], tmp_path: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    build_cache(TinyTokenTeacher(), samples, [], tmp_path / "whole", shard_size=4, batch_size=2, token_grid=4)
    with pytest.raises(KeyboardInterrupt):
        build_cache(
            TinyTokenTeacher(fail_after=7), samples, [], tmp_path / "cut", shard_size=4, batch_size=2, token_grid=4
        )
    build_cache(TinyTokenTeacher(), samples, [], tmp_path / "cut", shard_size=4, batch_size=2, token_grid=4)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_a_cache_of_another_grid_is_another_cache(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTokenTeacher(), samples, [], folder, token_grid=2)
    with pytest.raises(IntegrityError, match="token_grid 2 but 4"):
        build_cache(TinyTokenTeacher(), samples, [], folder, token_grid=4)
    with pytest.raises(IntegrityError, match="token_grid 2 but 0"):
        build_cache(TinyTokenTeacher(), samples, [], folder)


def test_tokens_that_are_not_there_are_refused(samples: list[Sample], folder: Path) -> None:
    with pytest.raises(UsageError, match="'tiny', which gives embeddings only"):
        build_cache(TinyTeacher(), samples, [], folder, token_grid=2)
    with pytest.raises(UsageError, match=r"maps of 5 x 5 places .* whose own have 4 x 4; finer ones would be made up"):
        build_cache(TinyTokenTeacher(), samples, [], folder, token_grid=5)
    assert token_shape(TinyTokenTeacher()) == (4, 6)
    cache = build_cache(TinyTeacher(), samples, [], folder)
    with pytest.raises(UsageError, match="keeps embeddings of 'tiny' and no token maps"):
        cache.tokens([samples[0].uid])


def test_tokens_that_are_no_numbers_are_refused(samples: list[Sample], folder: Path) -> None:
    class Broken(TinyTokenTeacher):
        def encode_image_tokens(self, pixels: torch.Tensor) -> TeacherOutput:
            output = super().encode_image_tokens(pixels)
            output.taps["tokens"][0, 3, 2] = float("inf")
            return output

    with pytest.raises(IntegrityError, match="non-finite"):
        build_cache(Broken(), samples, [], folder, token_grid=4)


def test_a_cache_of_the_first_schema_is_still_read(samples: list[Sample], folder: Path) -> None:
    """As a release without token maps wrote it."""
    build_cache(TinyTeacher(), samples, [], folder)
    manifest = json.loads((folder / "cache.json").read_text())
    manifest["schema_version"] = "1.0"
    del manifest["info"]["token_grid"], manifest["info"]["token_dim"]
    (folder / "cache.json").write_text(json.dumps(manifest))
    assert len(TeacherCache.open(folder)) == len(samples)
    again = TinyTeacher()
    build_cache(again, samples, [], folder)
    assert again.seen == 1


@pytest.mark.parametrize("kind", ["image", "features", "tokens", "text", "text_features"])
def test_a_row_that_is_no_number_is_named_by_every_reader(samples: list[Sample], folder: Path, kind: str) -> None:
    """Rows that were not asked for do not matter."""
    texts = ("a cat", "a dog", "a cow")
    cache = build_cache(TinyTokenTeacher(), samples, texts, folder, token_grid=2).load()
    ofs, files, names = cache._rows, cache._files, cache.uids
    if kind.startswith("text"):
        ofs, files, names = cache._text_rows, cache._text_files, cache.texts
    shard, row = ofs[names[1]]
    stored = cache._open[files[shard]]["features" if "features" in kind else kind]
    stored[row].view(-1)[-1] = float("nan")
    read = getattr(cache, kind)
    assert torch.isfinite(read([names[0], names[2]])).all()
    with pytest.raises(IntegrityError, match=f"{names[1]!r} is not finite, and one such target"):
        read(names[:3])
