"""Connectors against loops over plain numbers, in float64, and each of them inside a model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm, save_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import DecoderConfig, Reduction, VlmConfig
from pocketvlm.students.vlm.connectors import Connector, CrossAttention, Fusion, Mqt, Nested, TokenPacker, grid_sines
from pocketvlm.students.vlm.decoder import Block
from pocketvlm.students.vlm.model import rows_of

TOKENIZER = train_vlm_tokenizer(["What is this?", "a small dolphin"], 500, words=["dolphin", "what", "is", "this"])
Vector = list[float]


@pytest.fixture(autouse=True)
def _wide() -> object:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _config(connector: str, **changes: object) -> VlmConfig:
    values = {
        "name": "tiny",
        "connector": connector,
        "vision": {"backbone": "test_efficientnet", "size": 64, "levels": [2]},
        "connector_hidden": 16,
        "connector_heads": 4,
        "decoder": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 48, "context_length": 64},
    }
    return VlmConfig.model_validate(values | changes)


def _linear(layer: nn.Linear, x: Vector) -> Vector:
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(layer.weight.tolist(), bias)]


def _normed(layer: nn.LayerNorm, x: Vector) -> Vector:
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
    return [(v - mean) / spread * w + b for v, w, b in zip(x, layer.weight.tolist(), layer.bias.tolist())]


def _gelu(x: Vector) -> Vector:
    return [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]


def _attended(layer: CrossAttention, query: Vector, keys: list[Vector], values: list[Vector]) -> Vector:
    """One query over some tokens, head by head."""
    q = _linear(layer.q_proj, query)
    ks, vs = [_linear(layer.k_proj, k) for k in keys], [_linear(layer.v_proj, v) for v in values]
    wide = len(q) // layer.heads
    mixed: Vector = []
    for head in range(layer.heads):
        part = slice(head * wide, head * wide + wide)
        logits = [sum(a * b for a, b in zip(q[part], k[part])) / math.sqrt(wide) for k in ks]
        weights = [math.exp(value - max(logits)) for value in logits]
        for c in range(part.start, part.stop):
            mixed.append(sum(w * v[c] for w, v in zip(weights, vs)) / sum(weights))
    return _linear(layer.o_proj, mixed)


def _moved(module: nn.Module) -> nn.Module:
    """With norms and biases that are not those of the start, which would hide mistakes."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return module


@pytest.mark.parametrize("side", [1, 2, 3])
def test_tokenpacker_asks_the_own_cell_alone(side: int) -> None:
    module = _moved(TokenPacker(7, 4, 8, 5, 6, side**2, 2))
    assert isinstance(module, TokenPacker)
    features = torch.randn(2, 36, 7)
    found, cell = module(features, side**2), 6 // side
    assert found.shape == (2, side**2, 5)
    for batch in range(2):
        tokens = [_normed(module.norm, token) for token in features[batch].tolist()]
        for place in range(side**2):
            top, left = place // side * cell, place % side * cell
            own = [tokens[(top + dy) * 6 + left + dx] for dy in range(cell) for dx in range(cell)]
            # bilinear between the middles of pixels: the four around the middle of the cell, or the one there
            near = [cell // 2] if cell % 2 else [cell // 2 - 1, cell // 2]
            middle = [tokens[(top + dy) * 6 + left + dx][-4:] for dy in near for dx in near]
            coarse = [sum(column) / len(middle) for column in zip(*middle)]
            query = _normed(module.query_norm, _linear(module.query, coarse))
            keys, values = (
                [_normed(norm, _linear(mlp[2], _gelu(_linear(mlp[0], x)))) for x in own]
                for mlp, norm in ((module.key, module.key_norm), (module.value, module.value_norm))
            )
            mixed = _attended(module.attention, query, keys, values)
            expected = _linear(module.out[2], _gelu(_linear(module.out[0], mixed)))
            torch.testing.assert_close(found[batch, place], torch.tensor(expected))


def _sines(row: float, column: float, width: int) -> Vector:
    found: Vector = []
    for value in (row, column):
        angles = [value / 10_000 ** (i / (width // 4)) for i in range(width // 4)]
        found += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return found


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_mqt_pools_by_weights_that_no_picture_changes(keep: int) -> None:
    module = _moved(Mqt(6, 8, 5, 4, 5, 2).double())
    assert isinstance(module, Mqt)
    features = torch.randn(2, 16, 6)
    found = module(features, keep)
    assert found.shape == (2, keep, 5)
    # 5 queries lie on a grid of 3 x 3; of the 4 x 4 places the middle of place i is at (i + 1/2) 3/4 - 1/2 there
    at = [(i + 0.5) * 0.75 - 0.5 for i in range(4)]
    keys = [_normed(module.key_norm, _sines(at[place // 4], at[place % 4], 8)) for place in range(16)]
    for batch in range(2):
        values = [
            _normed(module.value_norm, _linear(module.first, _normed(module.norm, token)))
            for token in features[batch].tolist()
        ]
        for query in range(keep):
            learnt = module.queries[query].tolist()
            asked = [a + b for a, b in zip(learnt, _sines(query // 3, query % 3, 8))]
            mixed = _attended(module.attention, _normed(module.query_norm, asked), keys, values)
            # the tables of positions are float32
            torch.testing.assert_close(
                found[batch, query], torch.tensor(_linear(module.out, mixed)), rtol=1e-5, atol=1e-5
            )
    # fewer tokens are the first of many
    torch.testing.assert_close(found, module(features, 5)[:, :keep])


def test_nested_tokens_are_means_and_its_weights_the_mlps() -> None:
    plain, nested = Connector(6, 8, 5, 36), Nested(6, 8, 5, 36)
    nested.load_state_dict(plain.state_dict())
    features = torch.randn(2, 36, 6)
    assert nested.sizes == (1, 4, 9, 36)
    whole = plain(features, 36)
    assert torch.equal(nested(features, 36), whole)
    found = nested(features, 9)
    for place in range(9):
        top, left = place // 3 * 2, place % 3 * 2
        own = [whole[:, (top + dy) * 6 + left + dx] for dy in range(2) for dx in range(2)]
        torch.testing.assert_close(found[:, place], torch.stack(own).mean(0))


def test_fusion_is_its_blocks_over_the_whole_sequence() -> None:
    decoder = DecoderConfig(width=16, layers=1, heads=4, kv_heads=2, hidden=24, context_length=40)
    module = _moved(Fusion(6, 8, 2, 9, 3, decoder))
    assert isinstance(module, Fusion)
    features, text = torch.randn(2, 9, 6), torch.randn(2, 5, 16)
    drawn, keys, values = module.picture(features)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None]
    fused = module.fuse(keys, values, text, torch.arange(5).expand(2, -1), visible)
    # one query after the other over the MLP's embeddings, then all tokens through all blocks at once
    seen = Connector.forward(module, features, 9)
    scale = (seen.square().mean(-1, keepdim=True) + decoder.norm_eps).rsqrt()
    known = seen * scale * module.key_norm.weight
    first = [
        [
            _attended(module.attention, query, known[row].tolist(), known[row].tolist())
            for query in module.queries.tolist()
        ]
        for row in range(2)
    ]
    x = torch.cat([seen, torch.tensor(first), text], dim=1)
    positions = torch.arange(16)
    whole = torch.zeros(16, 16, dtype=torch.bool)
    whole[:, :11] = True
    whole[11:, 11:] = visible[0]
    for block in module.blocks:
        assert isinstance(block, Block)
        x = block(x, module.cos[positions][None, None], module.sin[positions][None, None], whole[None, None])
    torch.testing.assert_close(drawn, x[:, 9:11])
    torch.testing.assert_close(fused, x[:, 11:])
    assert torch.equal(module(features, 2), drawn)


def test_places_of_two_grids_mean_the_same_spot() -> None:
    fine, coarse = grid_sines(4, 8, 2), grid_sines(2, 8, 2)
    # the mean angle of the first two of four rows is the first of two
    assert coarse[0, 0] == pytest.approx(math.sin(0))
    assert fine[0, 0] == pytest.approx(math.sin(-0.25))
    assert fine[4, 0] == pytest.approx(math.sin(0.25))
    assert fine[1, 4] == pytest.approx(math.sin(0.25))


MADE: dict[str, Callable[[], VlmConfig]] = {
    "nested": lambda: _config("nested", reduction=Reduction(method="connector", keep=1)),
    "tokenpacker": lambda: _config("tokenpacker", connector_tokens=1),
    "mqt": lambda: _config("mqt", connector_tokens=5, reduction=Reduction(method="connector", keep=3)),
    "mqt renumbered": lambda: _config(
        "mqt", connector_tokens=5, reduction=Reduction(method="connector", keep=3, positions="renumbered")
    ),
    "fusion": lambda: _config("fusion"),
}


def _model(name: str) -> Vlm:
    torch.set_default_dtype(torch.float32)
    model = build_vlm(MADE[name](), TOKENIZER, seed=2).eval()
    with torch.no_grad():
        for weight in (*model.decoder.layers.parameters(), *model.connector.parameters()):
            if weight.ndim == 2:
                weight.mul_(6)
    return model


def _pixels(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 64, 64, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def _talk(model: Vlm, question: str, answer: list[int]) -> tuple[list[int], list[int]]:
    return model.prompt_ids(question), [*answer, 2]


@pytest.mark.parametrize("name", MADE)
def test_a_model_with_each_connector_answers_as_it_reads(name: str) -> None:
    model, prompts = _model(name), ["What is this?", "a dolphin"]
    found = model.generate(_pixels(2), prompts, max_new_tokens=4)
    for row, prompt in enumerate(prompts):
        said: list[int] = []
        for _ in range(4):
            rows = rows_of([[_talk(model, "is", []), _talk(model, prompt, said)]], 24)
            with torch.no_grad():
                token = int(model(_pixels(2)[row : row + 1], rows)[-1].argmax())
            if token == 2:
                break
            said.append(token)
        assert found[row] == model.tokenizer.decode(said)
    assert model.picture(_pixels(2)).shape == (2, model.prefix, 32)


@pytest.mark.parametrize("name", MADE)
def test_the_loss_reaches_every_part_and_files_keep_it(name: str, tmp_path: object) -> None:
    model = _model(name)
    rows = rows_of([[_talk(model, "What is this?", model.tokenizer.encode("dolphin"))]], 16)
    torch.nn.functional.cross_entropy(model(_pixels(1), rows), rows.targets).backward()
    without = [
        key for key, weight in model.connector.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    # with one place to look at, and for a bias that all keys share, attention is what it is
    allowed = {"attention.k_proj.bias", *(f"attention.{part}" for part in ("q_proj.bias", "q_proj.weight"))}
    one = {"attention.k_proj.weight", "query.weight", "query.bias", "query_norm.weight", "query_norm.bias"}
    assert set(without) <= allowed | (one if name == "tokenpacker" else set()), without
    again = load_vlm(save_vlm(model, f"{tmp_path}/saved"))
    assert again.config == model.config
    assert again.generate(_pixels(1), ["What is this?"]) == model.generate(_pixels(1), ["What is this?"])


def test_training_draws_a_number_of_tokens_and_answers_use_the_chosen_one() -> None:
    model = _model("mqt")
    rows = rows_of([[_talk(model, "What is this?", model.tokenizer.encode("dolphin"))]], 16)
    assert model.hidden(_pixels(1), rows).shape[1] == 1 + 3 + 16
    model.train()
    torch.manual_seed(0)
    lengths = {model.hidden(_pixels(1), rows).shape[1] - 17 for _ in range(40)}
    assert lengths == {1, 2, 3, 4, 5}
    model.reduce_tokens(None)
    assert model.eval().hidden(_pixels(1), rows).shape[1] == 1 + 5 + 16


class _Picture(nn.Module):
    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.picture(pixels)


@pytest.mark.parametrize("name", ["tokenpacker", "mqt", "fusion"])
def test_each_connector_exports_at_a_fixed_number_of_tokens(name: str) -> None:
    module = _Picture(_model(name)).eval()
    exported = torch.export.export(module, (_pixels(1),)).module()
    torch.testing.assert_close(exported(_pixels(1)), module(_pixels(1)))


def test_connectors_that_cannot_be_are_refused_in_a_sentence() -> None:
    torch.set_default_dtype(torch.float32)
    for config, said in [
        (_config("tokenpacker", connector_tokens=3), "whose cells would differ in size"),
        (_config("tokenpacker", connector_tokens=9), "whose cells would differ in size"),
        (_config("tokenpacker", connector_tokens=1, connector_heads=3), "does not split into connector_heads 3"),
        (_config("mqt", connector_hidden=18, connector_heads=2), "connector_hidden 18"),
        (_config("mlp", connector_tokens=2), "was told connector_tokens 2"),
    ]:
        with pytest.raises(UsageError, match=said):
            build_vlm(config, TOKENIZER)
