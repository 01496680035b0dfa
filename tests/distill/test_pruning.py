"""Pruning of what a user has: CLIP models become students, are pruned, distilled from the unpruned one and exported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distill_toys import TINY_STUDENT, toy_recipe

from pocketvlm.data import open_data
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.pruning import Retrieval, convert, open_student, prune_to, ranks_of, summary
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.distill.student_teacher import StudentTeacher, open_teacher
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.numerics import WideConstants
from pocketvlm.students import Student, build_student, load_student, save_student, train_tokenizer
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.base import TokenTeacher

SIZE, LENGTH = 32, 16
TEXTS = ["a photo of a cat", "two dogs! ! !", "naïve café", "the quick brown fox " * 12]
VIT = {"backbone": "vit_tiny_patch16_224", "size": 32,
       "backbone_args": {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 4}}  # fmt: skip
SMALL = {"keep_heads": 0.5, "keep_mlp": 0.5, "keep_depth": 0.7, "groups": 4}


def randomise(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_open_clip(folder: Path, *, quick: bool = True, **changes: Any) -> tuple[str, Any]:
    import open_clip

    config: dict[str, Any] = {
        "embed_dim": 24,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
    }
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    # open_clip keeps architectures by name for good
    path = folder / f"pocketvlm_prune_{'quick' if quick else '_'.join(changes) or 'gelu'}.json"
    path.write_text(json.dumps(config))
    if open_clip.get_model_config(path.stem) is None:
        open_clip.add_model_config(path)
    model = randomise(open_clip.create_model(path.stem))
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"open_clip:{path}@{folder / 'weights.pt'}", model


def save_hf(folder: Path, kind: str = "clip") -> tuple[str, Any]:
    """A CLIP whose padding is its end token, as OpenAI's checkpoints have it; or a SigLIP."""
    import transformers
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers import models, pre_tokenizers, processors, trainers

    raw = RawTokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<unk>", "<spare>", "<s>", "<e>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS * 9, trainer)
    ids = [(token, raw.token_to_id(token)) for token in special]
    raw.post_processor = processors.TemplateProcessing(single="<s> $A <e>", special_tokens=ids)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<e>", eos_token="<e>", bos_token="<s>", unk_token="<unk>",
        padding_side="right", model_max_length=LENGTH,
    )  # fmt: skip
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = {**tower, "image_size": SIZE, "patch_size": 8, "num_hidden_layers": 4}
    # the eos id of 2 would ask for the highest id; this one is another one
    end = raw.token_to_id("<e>")
    text = {**tower, "vocab_size": len(tokenizer) + 5, "max_position_embeddings": LENGTH, "num_hidden_layers": 3}
    if kind == "clip":
        text |= {"eos_token_id": end, "pad_token_id": end}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config)
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    else:
        config = transformers.SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)
        model = transformers.SiglipModel(config)
        transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    randomise(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"hf:{folder}", model


def pixels(count: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))


def student_answers(student: Student, texts: list[str]) -> list[torch.Tensor]:
    """Unit vectors of the pictures and of the texts, by the student's own tokenizer."""
    ids = torch.from_numpy(Tokenizer(student.tokenizer_json, student.text_spec).encode(texts))
    with torch.no_grad():
        found = student.encode_image(pixels()).embedding, student.encode_text(ids).embedding
    return [F.normalize(value, dim=-1) for value in found]


@torch.no_grad()
def silence(model: Any, pruned: Any, groups: int) -> Any:
    """An independent mask in the upstream model: output weights of what was pruned are zeroed, blocks are left out."""
    model = copy.deepcopy(model)
    hf = hasattr(model, "vision_model")
    towers = {
        "image": model.vision_model if hf else model.visual,
        "text": model.text_model if hf else getattr(model, "text", model),
    }
    for name, tower in towers.items():
        holder, key = (tower.encoder, "layers") if hf else (tower.transformer, "resblocks")
        blocks = getattr(holder, key)
        for left in pruned.kept[name]:
            block = blocks[left.number]
            out = block.self_attn.out_proj if hf else block.attn.out_proj
            fc2 = block.mlp.fc2 if hf else block.mlp.c_proj
            for head in set(range(4)) - set(left.heads):
                out.weight[:, head * 8 : head * 8 + 8] = 0
            for group in set(range(groups)) - set(left.mlp_groups):
                width = fc2.in_features // groups
                fc2.weight[:, group * width : (group + 1) * width] = 0
        setattr(holder, key, torch.nn.ModuleList(blocks[left.number] for left in pruned.kept[name]))
    return model


@pytest.mark.parametrize("kind", ["open_clip", "open_clip gelu, own text module", "hf"])
def test_a_clip_becomes_a_student_and_surgery_equals_masking_the_original(kind: str, tmp_path: Path) -> None:
    if kind == "hf":
        spec, model = save_hf(tmp_path / "model")
    elif kind == "open_clip":
        spec, model = save_open_clip(tmp_path / "model")
    else:
        spec, model = save_open_clip(tmp_path / "model", quick=False, custom_text=True)
    teacher = load_teacher(spec)
    student = open_student(spec)
    assert student.text_spec.pad_id == 0
    with torch.no_grad():
        wanted = [teacher.encode_images(pixels()).embedding, teacher.encode_texts(TEXTS).embedding]
    for own, theirs in zip(student_answers(student, TEXTS), wanted):
        assert (own - theirs).abs().max() < 1e-6
    assert student.licences == teacher.licences
    assert student.logit_scale.item() == pytest.approx(max(1.0, teacher.logit_scale))

    found = prune_to(spec, tmp_path / "small", method="random", seed=3, device="cpu", **SMALL)
    small = load_student(tmp_path / "small").double()
    teacher.model = silence(model, found, SMALL["groups"]).double()
    x = teacher._normalised(pixels()).double()
    with torch.no_grad(), WideConstants():
        if kind == "hf":
            image, text = teacher.model.get_image_features(x), teacher.model.get_text_features(**teacher._batch(TEXTS))
        else:
            image, text = teacher.model.encode_image(x), teacher.model.encode_text(teacher.tokenize(TEXTS))
    # float64 everywhere but in the division by 255, which the teacher does in float32
    for own, theirs in zip(student_answers(small, TEXTS), (image, text)):
        assert (own - F.normalize(theirs, dim=-1)).abs().max() < 1e-6
    described = json.loads((tmp_path / "small" / "pruning.json").read_text())
    assert str(tmp_path) not in json.dumps(described), "a path would tell everybody where it lay"
    assert described["parameters"]["after"]["image"] < described["parameters"]["before"]["image"]
    assert [len(described["kept"][tower]) for tower in ("image", "text")] == [3, 2]
    assert len(described["ranking"]) == 2 * 7 * 4 + 7
    assert described["score"] is None
    if kind == "hf":
        from pocketvlm.export.bundle import export_bundle

        edge = EdgeModel.load(export_bundle(tmp_path / "small", tmp_path / "bundle", ("onnx",), ("fp32",)))
        wanted_text = student_answers(load_student(tmp_path / "small"), TEXTS)[1]
        assert np.abs(edge.embed_text(TEXTS) - wanted_text.numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_cfg": {"pool_type": "avg"}}, "another pooling than the class token's"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "layer scale"),
        ({"vision_cfg": {"no_ln_pre": True}}, "Identity"),
        ({"text_cfg": {"pool_type": "last"}}, "does not pool the end token"),
        ({"custom_text": True, "text_cfg": {"proj_bias": True}}, "a text projection with a layer of its own"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8}}, "image tower ModifiedResNet"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    import open_clip

    spec, _ = save_open_clip(tmp_path / "model")
    teacher: Any = load_teacher(spec)
    config = json.loads(Path(spec.partition(":")[2].partition("@")[0]).read_text())
    config.pop("quick_gelu")
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    build = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    teacher.model = build(**config)
    with pytest.raises(UsageError, match=said):
        convert(teacher)


def test_siglip_and_changed_arithmetic_are_refused(tmp_path: Path) -> None:
    spec, _ = save_hf(tmp_path / "siglip", "siglip")
    with pytest.raises(UsageError, match="another architecture than CLIP's \\(SiglipModel\\)"):
        open_student(spec)
    spec, _ = save_hf(tmp_path / "clip")
    teacher: Any = load_teacher(spec)
    teacher.model.vision_model.pre_layrnorm.eps = 1e-3
    with pytest.raises(UsageError, match="a layer norm with eps 1e-05 is expected"):
        convert(teacher)
    # what no check above knows of shows in the embeddings
    teacher.model.vision_model.pre_layrnorm.eps = 1e-5
    teacher.model.text_model.encoder.layers[1].self_attn.scale *= 1.5
    with pytest.raises(UsageError, match=r"the text tower of .* rebuilt as a student differs from it by"):
        convert(teacher)


@pytest.fixture
def unpruned(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["amber azure beige thing black blue red green", "navy ochre olive thing"], 120)
    text = {**TINY_STUDENT["text"], "layers": 2, "heads": 4}
    student = build_student(
        "vit-tiny", embed_dim=16, tokenizer_json=tokenizer, overrides={"image": VIT, "text": text}, seed=2
    )
    return save_student(student, tmp_path / "unpruned")


def test_from_the_unpruned_run_to_an_exported_bundle(
    unpruned: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm.export.bundle import export_bundle

    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    data = f"{world}?check=none"
    result = prune_to(str(unpruned), tmp_path / "pruned", data=data, device="cpu", method="mope", **SMALL)
    described = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert described["method"] == "mope"
    assert described["score"]["before"] == result.scores["before"]
    assert described["score"]["pictures"] == 36
    # the importance in the file is the drop of the score without that module, measured from scratch
    first = described["ranking"][0]
    score = Retrieval(open_data(data), load_student(unpruned))
    from pocketvlm.students.prune import Module, without

    student = load_student(unpruned)
    with without(student, Module(*(first[key] for key in ("tower", "kind", "block", "index"))), 4):
        assert score(load_student(unpruned), None) - score(student, None) == pytest.approx(first["importance"])
    assert "image: 0.0" in summary(result)
    assert "before" in summary(result)

    changes = [
        f"student.init={tmp_path / 'pruned'}", f"teacher.spec=student:{unpruned}", f"data.train={data}",
        f"data.eval={data}", "views.count=1", "train.steps=2", "train.batch_size=8", "train.warmup_steps=1",
        "train.threads=1", "train.log_every=1",
    ]  # fmt: skip
    run = distill_run(load_recipe("inherited", changes), tmp_path / "run", progress=False)
    assert run.steps == 2
    terms = {key for row in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in row}
    assert {"loss/feature_image", "loss/feature_text"} < terms
    trained = load_student(tmp_path / "run")
    assert trained.config.image.blocks == result.student.config.image.blocks
    assert trained.space_id == load_student(unpruned).contract.space_id
    bundle = export_bundle(tmp_path / "run", tmp_path / "bundle", ("onnx",), ("fp32",))
    model = EdgeModel.load(bundle)
    found = model.embed_text(["red thing", "navy thing"])
    wanted = student_answers(trained, ["red thing", "navy thing"])[1].numpy()
    assert np.abs(found - wanted).max() < 1e-5
    picture = pixels(1).numpy()[0]
    assert np.abs(model.embed_image([picture]) - student_answers(trained, ["red thing"])[0][:1].numpy()).max() < 1e-5


def test_a_student_is_a_teacher(unpruned: Path) -> None:
    teacher = open_teacher(f"student:{unpruned}")
    assert isinstance(teacher, StudentTeacher)
    assert isinstance(teacher, TokenTeacher)
    student = load_student(unpruned)
    texts = ["red thing", "navy thing"]
    image, text = student_answers(student, texts)
    torch.testing.assert_close(teacher.encode_images(pixels()).embedding, image)
    torch.testing.assert_close(teacher.encode_texts(texts).embedding, text)
    assert teacher.encode_images(pixels()).features is not None
    assert teacher.encode_image_tokens(pixels()).taps["tokens"].shape == (3, 16, 24)
    assert (teacher.dim, teacher.logit_scale) == (16, pytest.approx(float(student.logit_scale)))
    assert teacher.space_id == student.contract.space_id
    same, other = open_teacher(f"student:{unpruned}"), build_student(student.config, embed_dim=16, seed=9,
                                                                    tokenizer_json=student.tokenizer_json)  # fmt: skip
    assert teacher.fingerprint == same.fingerprint
    assert teacher.fingerprint != StudentTeacher(other, name="other").fingerprint
    with pytest.raises(UsageError, match="does not say which one; write student:FOLDER"):
        open_teacher("student:")
    with pytest.raises(UsageError, match=r"holds no student\.json"):
        open_teacher("student:nowhere")


def test_ranks_by_an_independent_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    # few different values, so that ties are there
    scores = torch.randint(0, 4, (30, 7), generator=generator).float()
    match = torch.rand(30, 7, generator=generator) < 0.3
    match[:, 2] = True
    wanted = []
    for row, own in zip(scores.tolist(), match.tolist()):
        best = max(value for value, hit in zip(row, own) if hit)
        wanted.append(1 + sum(value >= best and not hit for value, hit in zip(row, own)))
    assert ranks_of(scores, match).tolist() == wanted
    scores[0, 0] = float("nan")
    assert ranks_of(scores, match)[0] == 7


def test_mistakes_are_one_sentence(unpruned: Path, world: Path, tmp_path: Path, toy_teacher: None) -> None:
    with pytest.raises(UsageError, match=r"is not empty and would be lost; name another one or pass --overwrite"):
        prune_to(str(unpruned), unpruned, method="prefix", keep_depth=0.5)
    with pytest.raises(UsageError, match="was given none, so it could not tell them apart"):
        prune_to(str(unpruned), tmp_path / "out", keep_depth=0.5)
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"image": str(world.parent / "red.png")}) + "\n")
    with pytest.raises(UsageError, match="has 0 different captions of readable pictures"):
        prune_to(str(unpruned), tmp_path / "out", data=f"{bare}?check=none", keep_depth=0.5)
    assert not (tmp_path / "out").exists()
    raw = toy_recipe(world, tmp_path / "cache", student={"name": "init"})
    with pytest.raises(UsageError, match=r"student\.init names no folder"):
        load_recipe(raw)
    with pytest.raises(UsageError, match="overrides would change the saved student"):
        load_recipe(raw, [f"student.init={unpruned}", "student.overrides={image: {size: 64}}"])
    wide = build_student(load_student(unpruned).config, embed_dim=12, tokenizer_json=unpruned / "tokenizer.json")
    recipe = load_recipe(raw, [f"student.init={save_student(wide, tmp_path / 'wide')}"])
    with pytest.raises(UsageError, match="gives 12-wide embeddings but 'toy' gives 16-wide ones"):
        distill_run(recipe, tmp_path / "run", progress=False)
