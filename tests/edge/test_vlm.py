"""`EdgeVLM`: answers equal to the student's own, streamed and whole; what it refuses; files that were changed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.edge.bundle import Bundle, sha256_file
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UnknownNameError, UsageError
from pocketvlm.edge.vlm import AnswerStream, EdgeVLM
from pocketvlm.edge.vlm_bundle import VlmBundle, VlmContract
from pocketvlm.edge.vlm_text import Pieces
from pocketvlm.export.vlm.bundle import export_vlm
from pocketvlm.students.vlm import Vlm, save_vlm

PROMPTS = ("What is this?", "<image>\nbus", "is a taxi top left of the dolphin?", "wo ist die büroklammer")


def _toy() -> ModuleType:
    path = Path(__file__).parents[1] / "export" / "toy_vlm.py"
    spec = importlib.util.spec_from_file_location("toy_vlm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = _toy()


@pytest.fixture(scope="module")
def student() -> Vlm:
    return toy.toy_vlm()


@pytest.fixture(scope="module")
def bundle(student: Vlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    save_vlm(student, folder / "student")
    return export_vlm(folder / "student", folder / "bundle", ["onnx"], ["fp32", "int8"])


@pytest.fixture(scope="module")
def edge(bundle: Path) -> EdgeVLM:
    return EdgeVLM.load(bundle, threads=1)


def expected(student: Vlm, pixels: np.ndarray, prompt: str, tokens: int) -> str:
    return student.generate(torch.from_numpy(pixels)[None], [prompt], max_new_tokens=tokens)[0]


def test_answers_are_the_students(student: Vlm, edge: EdgeVLM) -> None:
    found = []
    for seed, prompt in enumerate(PROMPTS):
        pixels = toy.picture(seed)
        answer = edge.generate(pixels, prompt, max_new_tokens=8)
        assert answer.text == expected(student, pixels, prompt, 8)
        assert answer.text == edge.text.decode(list(answer.ids))
        assert answer.ended == (len(answer.ids) < 8)
        assert answer.first_token_ms > 0
        assert (answer.tokens_per_second is None) == (len(answer.ids) + answer.ended == 1)
        found.append(answer.text)
    assert len(set(found)) == len(PROMPTS)
    # and they depend on the picture
    assert len({edge.generate(toy.picture(seed), PROMPTS[0], max_new_tokens=8).text for seed in range(6)}) > 1


def test_the_cache_ends_an_answer_where_the_students_ends(student: Vlm, edge: EdgeVLM) -> None:
    prompt = "bus " * 28
    answer = edge.generate(toy.picture(), prompt, max_new_tokens=50)
    assert answer.text == expected(student, toy.picture(), prompt, 50)
    assert 1 <= len(answer.ids) <= 48 - edge.contract.prefix - 30


def test_pieces_make_the_answer_and_streams_do_not_disturb_each_other(edge: EdgeVLM) -> None:
    whole = [edge.generate(toy.picture(seed), PROMPTS[seed], max_new_tokens=12) for seed in range(2)]
    streams = [edge.generate(toy.picture(seed), PROMPTS[seed], max_new_tokens=12, stream=True) for seed in range(2)]
    assert all(isinstance(stream, AnswerStream) and stream.answer is None for stream in streams)
    said: list[list[str]] = [[], []]
    waiting = [0, 1]
    while waiting:  # one piece of each in turn
        for number in list(waiting):
            piece = next(streams[number], None)
            if piece is None:
                waiting.remove(number)
            else:
                said[number].append(piece)
    for pieces, stream, answer in zip(said, streams, whole):
        assert "".join(pieces) == answer.text
        assert all(pieces)
        assert stream.answer is not None
        assert stream.answer.ids == answer.ids


def test_letters_of_several_bytes_are_held_back_until_they_are_whole(edge: EdgeVLM) -> None:
    encode = edge.text._tokenizer.encode
    ids = encode("bus 日本 naïve 🐬", add_special_tokens=False).ids
    pieces = Pieces(edge.text)
    said = [pieces.add(token) for token in ids]
    assert "".join([*said, pieces.rest()]) == "bus 日本 naïve 🐬"
    assert not any("�" in piece for piece in said)
    # bytes that are no text: what was said before stands, and all of it is the decoded whole
    first = encode("é日", add_special_tokens=False).ids
    broken = [*encode("bus", add_special_tokens=False).ids, *first[:-1], *encode("taxi", add_special_tokens=False).ids]
    pieces = Pieces(edge.text)
    said = [pieces.add(token) for token in broken]
    assert "".join([*said, pieces.rest()]) == edge.text.decode(broken)
    assert "�" in edge.text.decode(broken)


def test_pictures_from_wherever_they_come(edge: EdgeVLM, tmp_path: Path) -> None:
    pixels = toy.picture(2)
    image = Image.fromarray(pixels)
    file = BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    answers = {
        edge.generate(source, PROMPTS[0], max_new_tokens=6).ids
        for source in (pixels, image, file.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png"))
    }
    assert len(answers) == 1
    # what is not square is fitted and centred on white
    wide = np.full((16, 64, 3), 10, np.uint8)
    seen: list[np.ndarray] = []
    watched = EdgeVLM.load(edge.bundle, threads=1)
    picture = watched.backend.picture
    watched.backend.picture = lambda given: seen.append(given) or picture(given)  # type: ignore[method-assign, func-returns-value]
    watched.generate(wide, PROMPTS[0], max_new_tokens=1)
    assert (seen[0][0, 18:30] == 10).all()
    assert (seen[0][0, :18] == 255).all()
    assert (seen[0][0, 30:] == 255).all()
    with pytest.raises(BadSampleError, match="does not exist"):
        edge.generate(tmp_path / "b.png", PROMPTS[0])


def test_prompts_that_cannot_be_answered_are_refused_at_the_call(edge: EdgeVLM) -> None:
    for prompt, said in [
        ("<image> a <image>", "holds <image> 2 times"),
        ("<image> ", "asks nothing"),
        ("", "asks nothing"),
        ("bus " * 60, "the cache holds 37"),
        (3, "is a int"),
    ]:
        for stream in (False, True):
            with pytest.raises(UsageError, match=said):
                edge.generate(toy.picture(), prompt, stream=stream)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="which was demanded"):
        edge.generate(toy.picture(), "bus", need_marker=True)
    assert edge.generate(toy.picture(), "<image> bus", need_marker=True, max_new_tokens=2).ids
    with pytest.raises(BadSampleError, match="no Unicode text"):
        edge.generate(toy.picture(), "bus \ud800")
    with pytest.raises(UsageError, match="leaves no answer"):
        edge.generate(toy.picture(), "bus", max_new_tokens=0)
    with pytest.raises(UsageError, match="float64"):
        edge.generate(np.zeros((8, 8, 3)), "bus")


def test_what_is_not_there_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="precision of this bundle's onnx"):
        EdgeVLM.load(bundle, precision="w4")
    with pytest.raises(UnknownNameError, match="target of this bundle"):
        EdgeVLM.load(bundle, backend="executorch")
    with pytest.raises(UnknownNameError, match="backend"):
        EdgeVLM.load(bundle, backend="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads is 0"):
        EdgeVLM.load(bundle, threads=0)
    with pytest.raises(UsageError, match=r"has no bundle\.json"):
        EdgeVLM.load(tmp_path)
    assert EdgeVLM.load(bundle).variant.precision == "fp32"
    assert repr(EdgeVLM.load(bundle, precision="int8")) == "EdgeVLM(toy, onnxruntime int8)"


def _changed(bundle: Path, folder: Path) -> tuple[Path, dict]:
    shutil.copytree(bundle, folder)
    return folder, json.loads((folder / "bundle.json").read_text())


def _write(folder: Path, raw: dict) -> None:
    (folder / "bundle.json").write_text(json.dumps(raw))


def test_changed_files_are_refused(bundle: Path, tmp_path: Path) -> None:
    folder, raw = _changed(bundle, tmp_path / "a")
    file = folder / raw["variants"][0]["files"]["decoder"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="was changed or damaged"):
        EdgeVLM.load(folder)
    (folder / "onnx" / "more.onnx").write_bytes(b"")
    shutil.copy(bundle / raw["variants"][0]["files"]["decoder"], file)
    with pytest.raises(IntegrityError, match="is not listed"):
        EdgeVLM.load(folder)
    (folder / "onnx" / "more.onnx").unlink()
    EdgeVLM.load(folder)
    for change, said in [
        (lambda r: r["variants"][0]["files"].update(decoder="../decoder.onnx"), "not a plain path"),
        (lambda r: r["contract"].update(prefix=7), "not the one that it was exported with"),
        (lambda r: r["contract"].update(colour=7), "VlmContract field"),
        (lambda r: r["variants"][0]["files"].pop("picture"), "lacks a picture or decoder"),
        (lambda r: r["contract"].pop("template"), "lacks or garbles"),
        (lambda r: r["contract"].update(prefix=46), "leaves no room"),
    ]:
        broken = json.loads(json.dumps(raw))
        change(broken)
        _write(folder, broken)
        with pytest.raises((IntegrityError, UsageError), match=said):
            EdgeVLM.load(folder)


def test_a_file_of_another_model_is_refused(bundle: Path, tmp_path: Path, student: Vlm) -> None:
    """Hashes that fit do not make the graph that of the contract."""
    folder, raw = _changed(bundle, tmp_path / "a")

    def with_contract(**values: object) -> None:
        contract = raw["contract"] | values
        digest = VlmContract.from_dict(contract).digest()
        _write(folder, raw | {"contract": contract, "contract_sha256": digest})

    with_contract(context_length=56)
    with pytest.raises(IntegrityError, match="has caches of shapes"):
        EdgeVLM.load(folder)
    with_contract(layers=3)
    with pytest.raises(IntegrityError, match="are expected"):
        EdgeVLM.load(folder)
    with_contract(vocab_size=499)
    with pytest.raises(IntegrityError, match="363 ids and the decoder 499"):
        EdgeVLM.load(folder)
    with_contract(tokenizer_sha256="0" * 64)
    with pytest.raises(IntegrityError, match="ids would mean other words"):
        EdgeVLM.load(folder)
    with_contract(prefix=6)
    with pytest.raises(IntegrityError, match=r"gives embeddings of shape \[1, 10, 32\]"):
        EdgeVLM.load(folder).generate(toy.picture(), "bus")
    # the tokenizer's own damage
    (folder / "tokenizer.json").write_bytes(b"{}")
    raw["files"]["tokenizer.json"]["sha256"] = sha256_file(folder / "tokenizer.json")
    with_contract(tokenizer_sha256=sha256_file(folder / "tokenizer.json"))
    with pytest.raises(IntegrityError, match="is no tokenizer"):
        EdgeVLM.load(folder)


def test_the_two_kinds_of_bundle_are_told_apart(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="answers in words and one that embeds"):
        Bundle.load(bundle)
    folder, raw = _changed(bundle, tmp_path / "a")
    _write(folder, raw | {"contract": {"kind": "dual"}})
    with pytest.raises(UsageError, match="holds a 'dual' model"):
        VlmBundle.load(folder)


def test_numbers_that_are_none_are_no_answer(edge: EdgeVLM) -> None:
    broken = EdgeVLM.load(edge.bundle, threads=1)
    shape = (1, edge.contract.prefix, edge.contract.width)
    broken.backend.picture = lambda pixels: np.full(shape, np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match="NaN or infinity"):
        broken.generate(toy.picture(), "bus")


def test_it_runs_from_a_zip_and_without_torch(bundle: Path, edge: EdgeVLM, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "model"), "zip", bundle)
    code = (
        "import sys, numpy as np\n"
        "from pocketvlm.edge.vlm import EdgeVLM\n"
        f"model = EdgeVLM.load({archive!r}, threads=1)\n"
        "pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)\n"
        "print(*model.generate(pixels, 'bus', max_new_tokens=5).ids)\n"
        "print([m for m in ('torch', 'timm', 'transformers', 'pydantic') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ids = edge.generate(toy.picture(0), "bus", max_new_tokens=5).ids
    assert result.stdout.split("\n")[:2] == [" ".join(map(str, ids)), "[]"]
