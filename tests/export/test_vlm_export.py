"""Bundles of generative students: files of every runtime against the student, packed weights against plain rounding,
parity that passes and fails when it should, and the commands."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm import cli
from pocketvlm.edge.bundle import sha256_file
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.edge.vlm import EdgeVLM
from pocketvlm.edge.vlm_bundle import VlmBundle
from pocketvlm.export.vlm import graphs, parity
from pocketvlm.export.vlm.blocks import pack_blocks, unpack_blocks
from pocketvlm.export.vlm.bundle import export_vlm, plan_files
from pocketvlm.export.vlm.executorch_graph import Decode, Prefill, quantized
from pocketvlm.export.vlm.graphs import Step, checked_step, empty_caches
from pocketvlm.export.vlm.parity import check_vlm_parity, compare
from pocketvlm.export.vlm.reference import kl
from pocketvlm.export.vlm.reference_write import record_cases
from pocketvlm.students.vlm import Vlm, load_vlm, save_vlm
from pocketvlm.students.vlm.config import Reduction

_spec = importlib.util.spec_from_file_location("toy_vlm", Path(__file__).with_name("toy_vlm.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

ASKED = [(toy.picture(seed), prompt, 8) for seed, prompt in enumerate(("What is this?", "bus", "wo ist der taxi"))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(toy.toy_vlm(layers=1), tmp_path_factory.mktemp("vlm") / "student")


@pytest.fixture(scope="module")
def bundle(saved: Path) -> Path:
    return export_vlm(saved, saved.parent / "bundle", ["onnx"])


@pytest.fixture(scope="module")
def student(saved: Path) -> Vlm:
    return load_vlm(saved)


def test_files_of_onnx_hold_the_table_once_and_say_what_the_student_says(bundle: Path, student: Vlm) -> None:
    import onnx

    cases, noise, _ = record_cases(student, ASKED)
    opened = VlmBundle.load(bundle)
    assert [v.precision for v in opened.variants] == ["fp32", "int8", "w4"]
    worst = {}
    for variant in opened.variants:
        checked = compare(EdgeVLM.load(opened, "onnxruntime", variant.precision, 1), cases, noise, ([], []))
        worst[variant.precision] = checked.max_abs
        assert checked.failures == []
        assert checked.steps == sum(len(case.said) for case in cases)
        graph = onnx.load(str(bundle / variant.files["decoder"])).graph
        rows = student.tokenizer.vocab_size
        if variant.precision != "fp32":
            assert not [node for node in graph.node if node.op_type == "Gemm"]
            assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 4 * len(student.decoder.layers) + 2
        tables = [entry for entry in graph.initializer if entry.dims and entry.dims[0] == rows]
        assert len(tables) == (1 if variant.precision == "fp32" else 2)
        # every matrix is packed: what is left in float are scales, norms, and cosines and sines by position
        left = [
            entry for entry in graph.initializer if len(entry.dims) > 1 and entry.data_type == onnx.TensorProto.FLOAT
        ]
        left = [entry for entry in left if entry.dims[0] != 48 and "_s" not in entry.name]
        assert bool(left) == (variant.precision == "fp32")
        picture = onnx.load(str(bundle / variant.files["picture"])).graph
        assert not any(rows in entry.dims for entry in picture.initializer)
    assert worst["fp32"] < 1e-3 < worst["int8"] < worst["w4"]


def test_reading_the_answer_again_is_the_answer(student: Vlm) -> None:
    cases, noise, _ = record_cases(student, ASKED)
    for case in cases:
        pixels = torch.from_numpy(case.pixels)[None]
        assert case.text == student.generate(pixels, [case.prompt], max_new_tokens=8)[0]
        assert case.said == student.answer_ids(pixels, [case.prompt], max_new_tokens=8)[0]
        assert case.logits is not None
        # teacher forcing gives the choice that greedy decoding took
        assert case.logits.argmax(1).tolist() == case.said
    assert 0 < noise < 1e-3


def test_both_forms_of_the_step_are_the_decoders(student: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    for products in (False, True):
        assert isinstance(checked_step(student, products=products), Step)
    monkeypatch.setattr(graphs, "_UNSEEN", -1.0)
    with pytest.raises(UsageError, match="computes otherwise than its exported step"):
        checked_step(student)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_blocks_are_what_a_loop_rounds(bits: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 70)).astype(np.float32)
    weight[3] = 0
    blocks = pack_blocks(weight, bits)
    found = unpack_blocks(blocks)
    assert blocks.data.shape == (5, 3, 32 * bits // 8)
    for row in range(5):
        for start in range(0, 70, 32):
            part, scale = weight[row, start : start + 32], blocks.scales[row, start // 32]
            levels = found[row, start : start + 32] / scale
            np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            nearest = np.clip(np.round(part / scale), low, high) * scale
            np.testing.assert_allclose(found[row, start : start + 32], nearest, atol=1e-6)
            # no worse than the plain grid whose end is the largest value
            plain = np.abs(part).max() / (127 if bits == 8 else 7)
            plain = np.clip(np.round(part / max(plain, 1e-12)), low, high) * plain
            assert np.square(nearest - part).sum() <= np.square(plain - part).sum() + 1e-9


def test_executorch_says_what_its_quantized_weights_say(saved: Path, student: Vlm) -> None:
    """8da4w: its lowered methods against the same quantized modules in eager mode, which differ in rounding alone."""
    out = export_vlm(saved, saved.parent / "phone", ["executorch"], ["w4"])
    edge = EdgeVLM.load(out, "executorch", threads=1)
    assert edge.variant.files["picture"] == "executorch/picture-fp32.pte"
    words = quantized(student, checked_step(student, products=True), "w4")
    for pixels, prompt, _ in ASKED:
        ids = student.prompt_ids(prompt)
        decoding, found = edge.prefill(pixels, ids)
        with torch.no_grad():
            prefix = student.picture(torch.from_numpy(pixels)[None])
            np.testing.assert_allclose(edge.backend.picture(pixels[None]), prefix, rtol=1e-4, atol=1e-4)
            expected, *caches = Prefill(words)(prefix, torch.tensor([ids]), *empty_caches(student.decoder))
            for place in range(student.prefix + len(ids), student.prefix + len(ids) + 3):
                # a twentieth of the largest logit; another cache or place moves them by all of it
                assert np.abs(found - expected[0].numpy()).max() < 0.05 * float(expected.abs().max())
                token = int(expected.argmax())
                found = decoding.decode(token, place)
                expected, *caches = Decode(words)(torch.tensor([[token]]), torch.tensor([place]), *caches)
    # streams do not share a cache
    streams = [edge.generate(pixels, prompt, max_new_tokens=5, stream=True) for pixels, prompt, _ in ASKED[:2]]
    pairs = [[next(stream, "") for stream in streams] for _ in range(6)]
    for number, (pixels, prompt, _) in enumerate(ASKED[:2]):
        assert "".join(pair[number] for pair in pairs) == edge.generate(pixels, prompt, max_new_tokens=5).text


def test_a_student_with_fewer_visual_tokens_says_the_same_from_files(tmp_path: Path, student: Vlm) -> None:
    reduced = copy.deepcopy(student)
    reduced.reduce_tokens(Reduction(method="even", keep=4))
    assert reduced.prefix < student.prefix
    opened = VlmBundle.load(export_vlm(save_vlm(reduced, tmp_path / "s"), tmp_path / "b", ["onnx"], ["fp32"]))
    assert opened.contract.prefix == reduced.prefix
    cases, noise, _ = record_cases(load_vlm(tmp_path / "s"), ASKED)
    assert compare(EdgeVLM.load(opened, threads=1), cases, noise, ([], [])).failures == []
    whole = EdgeVLM.load(export_vlm(save_vlm(student, tmp_path / "w"), tmp_path / "c", ["onnx"], ["fp32"]), threads=1)
    assert compare(whole, cases, noise, ([], [])).failures


def test_parity_fails_where_a_file_says_something_else(bundle: Path, student: Vlm) -> None:
    cases, noise, _ = record_cases(student, ASKED)
    edge = EdgeVLM.load(bundle, threads=1)
    picture = edge.backend.picture
    edge.backend.picture = lambda pixels: -picture(pixels)  # type: ignore[method-assign]
    checked = compare(edge, cases, noise, ([True, True, False, True], [False, True, True, False]))
    assert len(checked.failures) == 3
    assert (checked.lost, checked.gained, checked.loss) == (2, 1, 25.0)
    assert "greedy answers differ" in checked.failures[0]
    assert "times the student's own" in checked.failures[1]
    assert "2 of 4 questions are lost and 1 gained" in checked.failures[2]
    assert checked.interval is not None
    assert checked.interval[0] < 25 < checked.interval[1]
    first = checked.divergences[0]
    case = cases[first.case]
    assert first.expected != first.found
    assert case.logits is not None
    best = np.sort(case.logits[first.step])
    assert first.margin == pytest.approx(best[-1] - best[-2])


def test_divergence_of_distributions_is_that_of_a_loop() -> None:
    p, q = np.random.default_rng(0).normal(size=(2, 4, 6)) * 3
    expected = []
    for a, b in zip(p, q):
        one, two = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        expected.append(sum(x * np.log(x / y) for x, y in zip(one, two)))
    np.testing.assert_allclose(kl(p, q), expected, rtol=1e-12)
    np.testing.assert_allclose(kl(p + 5, q - 900), expected, rtol=1e-9)


def test_what_cannot_be_exported_is_refused(saved: Path, bundle: Path, tmp_path: Path) -> None:
    for targets, precisions, said in [
        (["tflite"], None, "target of a generative student"),
        (["onnx"], ["w8"], "precision of onnx"),
    ]:
        with pytest.raises(UnknownNameError, match=said):
            plan_files(targets, precisions)
    with pytest.raises(UsageError, match="no target was asked for"):
        plan_files([], None)
    assert plan_files(["onnx", "coreml"], ["int8", "w8"]) == [("onnx", "int8"), ("coreml", "w8")]
    with pytest.raises(UsageError, match="is not empty"):
        export_vlm(saved, bundle)
    with pytest.raises(UsageError, match=r"holds no vlm\.json"):
        export_vlm(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_manifest_tells_what_an_app_needs(bundle: Path, saved: Path, student: Vlm) -> None:
    raw = json.loads((bundle / "bundle.json").read_text())
    contract = raw["contract"]
    assert contract["kind"] == "vlm"
    assert contract["template"] == {
        "begin": 1, "user": 3, "assistant": 4, "end": 2, "pad": 0, "first_text": 6, "marker": "<image>",
    }  # fmt: skip
    assert (contract["image"]["size"], contract["image"]["resize"]) == (toy.SIZE, "pad")
    assert contract["prefix"] == student.prefix
    assert raw["licences"] == [{"what": "words", "licence": "MIT", "attribution": "nobody", "url": ""}]
    assert raw["provenance"]["student_sha256"] == sha256_file(saved / "vlm.json")
    assert VlmBundle.load(bundle).contract.cache_shape == (2, 48, 8)
    assert [list(cache.shape) for cache in empty_caches(student.decoder)] == [[2, 48, 8]] * 2


def test_parity_of_a_bundle_by_the_command(
    bundle: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "parity.json"
    common = ["vlm", "parity", str(bundle), "--limit", "12", "--prompts", "3", "--questions", "6", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, "--model", str(saved), "--precisions", "fp32", "--out", str(report)])
    assert ended.value.code == 0
    found = json.loads(report.read_text())
    assert found["status"] == "pass"
    assert [v["identical"] for v in found["variants"]] == [3]
    assert found["variants"][0]["questions"] == 6
    assert "3 of 3" in capsys.readouterr().out
    # a budget that cannot be met
    monkeypatch.setattr(parity, "NOISE_FACTOR", 0.0)
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, "--model", str(saved), "--precisions", "fp32"])
    assert ended.value.code == 1
    assert "times the student's own" in capsys.readouterr().out
    # nothing to compare with, or nothing to compare
    for arguments, said in [
        (["--model", str(tmp_path)], "holds no vlm.json"),
        (["--model", str(saved), "--prompts", "0"], "nothing would be compared"),
        (["--model", str(saved), "--targets", "coreml"], "none that was chosen runs here"),
    ]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*common, *arguments])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    other = save_vlm(toy.toy_vlm(layers=1, seed=9), tmp_path / "other")
    with pytest.raises(IntegrityError, match="two models"):
        check_vlm_parity(bundle, other)


def test_a_question_by_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.fromarray(toy.picture(1)).save(tmp_path / "a.png")
    asked = ["vlm", "ask", str(bundle), str(tmp_path / "a.png"), "bus", "--max-new-tokens", "5"]
    cli.main([*asked, "--json"])
    told = json.loads(capsys.readouterr().out)
    cli.main(asked)
    said = capsys.readouterr()
    assert "onnxruntime fp32 (parity not checked): first token after" in said.err
    from pocketvlm.table import printable

    assert said.out == printable(told["text"]) + "\n"
    with pytest.raises(SystemExit) as ended:
        cli.main([*asked, "--precision", "int4"])
    assert ended.value.code == 2
    assert "precision of this bundle's onnx variants" in capsys.readouterr().err
