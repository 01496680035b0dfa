"""Visual tokens left out inside a model: settings against loops, against the whole sequence again, and exported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm, save_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.condense import condense
from pocketvlm.students.vlm.config import Reduction, VisionConfig, VlmConfig
from pocketvlm.students.vlm.decoder import Block
from pocketvlm.students.vlm.dropping import importance, layer_counts
from pocketvlm.students.vlm.flops import decoder_flops
from pocketvlm.students.vlm.model import Shown, rows_of
from pocketvlm.students.vlm.reduce import even_places, merge_alternating, pool_grid, received_scores
from pocketvlm.students.vlm.vision import VisionTower

TOKENIZER = train_vlm_tokenizer(["What is this?", "a small dolphin"], 500, words=["dolphin", "what", "is", "this"])
VALUES: dict[str, Any] = {
    "name": "tiny",
    "vision": {"backbone": "test_vit", "size": 64, "backbone_args": {"img_size": 64, "patch_size": 16}},
    "connector_hidden": 16,
    "decoder": {"width": 32, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 48, "context_length": 48},
}


@pytest.fixture(scope="module")
def model() -> Vlm:
    built = build_vlm(VlmConfig.model_validate(VALUES), TOKENIZER, seed=3).eval()
    with torch.no_grad():  # larger than at the start, so that positions and masks matter
        for weight in built.decoder.layers.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
        built.connector.places.mul_(30)
    return built


@pytest.fixture(autouse=True)
def _whole_again(model: Vlm) -> Iterator[None]:
    yield
    model.reduce_tokens(None)


def _pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _set(method: str, keep: int, **more: Any) -> Reduction:
    return Reduction.model_validate({"method": method, "keep": keep, **more})


SETTINGS = [
    *(_set("top", 5, score=score) for score in ("cls", "cls-layers", "received", "distinct")),
    _set("rows", 8, score="received"),
    *(_set(method, keep) for method, keep in (("even", 9), ("pool", 4), ("merge", 5), ("pyramid", 2), ("aim", 6))),
    _set("aim", 9, schedule=(9, 5, 5, 0)),
    _set("pyramid", 1, schedule=(16, 16, 3, 1)),
]
BOTH = [one.model_copy(update={"positions": kind}) for one in SETTINGS for kind in ("kept", "renumbered")]


def _name(one: Reduction) -> str:
    return f"{one.method}-{one.score}-{one.keep}-{one.positions}"


@pytest.mark.parametrize("reduction", BOTH, ids=_name)
def test_greedy_answers_are_those_of_the_whole_sequence_again(model: Vlm, reduction: Reduction) -> None:
    model.reduce_tokens(reduction)
    pixels, prompts = _pixels(2, seed=4), ["What is this?", "is a small dolphin this small what?"]
    found = model.generate(pixels, prompts, max_new_tokens=5)
    for row, prompt in enumerate(prompts):
        said: list[int] = []
        for _ in range(5):
            rows = rows_of([[(model.prompt_ids(prompt), [*said, 2])]], 24)
            with torch.no_grad():
                token = int(model(pixels[row : row + 1], rows)[-1].argmax())
            if token == 2:
                break
            said.append(token)
        assert found[row] == model.tokenizer.decode(said)
    assert model.picture(pixels).shape == (2, model.prefix, 32)
    # what was seen once serves again, in any order
    seen = model.look(pixels)
    assert model.generate(seen.rows([1, 0]), prompts[::-1], max_new_tokens=5) == found[::-1]


def test_all_tokens_kept_is_the_model_as_it_is(model: Vlm) -> None:
    pixels, prompts = _pixels(3), ["What is this?"] * 3
    rows = rows_of([[(model.prompt_ids("What is this?"), [2])]] * 3, 12)
    with torch.no_grad():
        plain = model.hidden(pixels, rows)
        x = torch.cat([model.picture(pixels), model.decoder.embed_tokens(rows.ids)], dim=1)
        positions = torch.cat([torch.arange(17).expand(3, -1), rows.positions + 17], dim=1)
        visible = torch.zeros(3, 1, 29, 29, dtype=torch.bool)
        visible[:, :, :, :17] = True
        causal = torch.ones(12, 12, dtype=torch.bool).tril()
        visible[:, 0, 17:, 17:] = (rows.turns[:, :, None] == rows.turns[:, None]) & causal
        torch.testing.assert_close(plain, model.decoder(x, positions, visible))
        expected = model.generate(pixels, prompts, max_new_tokens=4)
        for method in ("top", "rows", "even", "pool", "merge", "pyramid"):
            model.reduce_tokens(_set(method, 16))
            torch.testing.assert_close(model.hidden(pixels, rows), plain)
            assert model.generate(pixels, prompts, max_new_tokens=4) == expected


def _attention(block: Block, x: Tensor, positions: list[int], model: Vlm) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [H, T, T] between all tokens, values [H, T, D] and normed input of one sequence [T, W]."""
    wide = 8
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * block.input_layernorm.weight
    parts = []
    for layer, heads in ((block.self_attn.q_proj, 4), (block.self_attn.k_proj, 2), (block.self_attn.v_proj, 2)):
        parts.append((normed @ layer.weight.T).view(len(x), heads, wide).transpose(0, 1))
    q, k, v = parts
    turned = []
    for part in (q, k):
        again = part.clone()
        for token, position in enumerate(positions):
            for i in range(wide // 2):
                angle = position * 10_000.0 ** (-2 * i / wide)
                a, b = part[:, token, i], part[:, token, i + wide // 2]
                again[:, token, i] = a * math.cos(angle) - b * math.sin(angle)
                again[:, token, i + wide // 2] = b * math.cos(angle) + a * math.sin(angle)
        turned.append(again)
    q, k = turned[0], turned[1].repeat_interleave(2, dim=0)
    return q @ k.transpose(1, 2) / math.sqrt(wide), v.repeat_interleave(2, dim=0), normed


def _seen(logits: Tensor, temperature: float, pictures: int) -> Tensor:
    """Probabilities where text sees what came before and all see the prefix."""
    logits = logits / temperature
    for i in range(logits.shape[1]):
        for j in range(1 + pictures, logits.shape[1]):
            if j > i:
                logits[:, i, j] = -torch.inf
    return logits.softmax(-1)


def _dropped(model: Vlm, reduction: Reduction, tokens: Tensor, places: list[int], ids: list[int]) -> tuple[Tensor, Any]:
    """One picture and question through the decoder, by the definitions, keeping lists of who is still there."""
    counts = layer_counts(reduction, 16, 4)
    renumber = reduction.positions == "renumbered"
    begin = model.decoder.embed_tokens.weight[1]
    x = torch.cat([begin[None], tokens, model.decoder.embed_tokens.weight[torch.tensor(ids)]]).double()
    alive, left = list(range(len(tokens))), []
    text = len(ids)
    looked = torch.zeros(0)

    def positions(alive: list[int]) -> list[int]:
        if renumber:
            return list(range(1 + len(alive) + text))
        return [0, *(places[one] + 1 for one in alive), *(17 + t for t in range(text))]

    for layer, module in enumerate(model.decoder.layers):
        block = cast(Block, module)

        if counts[layer] < len(alive):
            if reduction.method == "pyramid":
                looked = _seen(_attention(block, x, positions(alive), model)[0], 1.0, len(alive))[:, -1].mean(0)
            order = sorted(range(len(alive)), key=lambda one: -float(looked[1 + one]))
            stay = sorted(order[: counts[layer]])
            x = torch.cat([x[:1], x[[1 + one for one in stay]], x[1 + len(alive) :]])
            alive = [alive[one] for one in stay]
        left.append(list(alive))
        logits, values, _ = _attention(block, x, positions(alive), model)
        if reduction.method == "aim":
            walk = _seen(logits, 0.1, len(alive))
            share = torch.full((4, len(x)), 1 / len(x), dtype=torch.float64)
            for _ in range(5):
                share = torch.stack([share[head] @ walk[head] for head in range(4)])
            looked = share.square().mean(0).sqrt()
        mixed = (_seen(logits, 1.0, len(alive)) @ values).transpose(0, 1).flatten(1)
        x = x + mixed @ block.self_attn.o_proj.weight.T
        normed = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * block.post_attention_layernorm.weight
        gate = normed @ block.mlp.gate_proj.weight.T
        x = x + (gate * gate.sigmoid() * (normed @ block.mlp.up_proj.weight.T)) @ block.mlp.down_proj.weight.T
    return x[-1] * (x[-1].square().mean() + 1e-5).rsqrt() * model.decoder.norm.weight, left


@pytest.mark.parametrize("reduction", [one for one in BOTH if one.inside], ids=_name)
def test_dropping_inside_is_what_the_definitions_say(model: Vlm, reduction: Reduction) -> None:
    model.double()
    try:
        model.reduce_tokens(reduction)
        tokens = _random(2, 16, 32, seed=5) * 3
        asked = [model.prompt_ids("What is this?"), model.prompt_ids("a small dolphin is this")]
        longest = max(map(len, asked))
        ids = torch.tensor([one + [0] * (longest - len(one)) for one in asked])
        first, places = condense(reduction, tokens, {})
        with torch.no_grad():
            shown = Shown(first, places, None)
            last, keys, _ = model.prefill(shown, ids, torch.tensor([len(one) for one in asked]))
            for row in range(2):
                expected, left = _dropped(model, reduction, first[row], places[row].tolist(), asked[row])
                # the rotary tables are float32
                torch.testing.assert_close(last[row], expected, rtol=1e-4, atol=1e-4)
                assert [len(one) for one in left] == list(model.counts)
        # a layer's cache ends where its last token is
        used = keys.abs().sum(dim=(1, 2, 4)) > 0
        assert used.sum(1).tolist() == [1 + count + longest for count in model.counts]
    finally:
        model.float()


def test_importance_is_a_walk_of_five_steps_from_the_valid_tokens() -> None:
    q, k = _random(2, 4, 6, 8), _random(2, 2, 6, 8, seed=1)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = importance(q, k, visible, valid)
    for batch in range(2):
        squares = [0.0] * 6
        for head in range(4):
            walk = []
            for i in range(6):
                dots = [float(q[batch, head, i] @ k[batch, head // 2, j]) / math.sqrt(8) / 0.1 for j in range(i + 1)]
                shares = [math.exp(dot - max(dots)) for dot in dots]
                walk.append([share / sum(shares) for share in shares] + [0.0] * (5 - i))
            number = int(valid[batch].sum())
            at = [1 / number if i < number else 0.0 for i in range(6)]
            for _ in range(5):
                at = [sum(at[i] * walk[i][j] for i in range(6)) for j in range(6)]
            squares = [old + new**2 / 4 for old, new in zip(squares, at)]
        expected = torch.tensor([math.sqrt(value) for value in squares], dtype=found.dtype)
        torch.testing.assert_close(found[batch], expected, rtol=1e-5, atol=1e-6)


def test_schedules_are_the_papers_where_they_say_it() -> None:
    # PyramidDrop: half, a quarter, an eighth behind layers 8, 16 and 24 of 32
    counts = layer_counts(_set("pyramid", 72), 576, 32)
    assert counts == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    # AIM on 28 layers: the share max(0, 1 - (l - 13) / 8) behind layer l from 14 on
    counts = layer_counts(_set("aim", 80), 320, 28)
    assert counts[:15] == (80,) * 15
    assert counts[15:] == tuple(int(80 * max(0, 1 - (layer - 13) / 8)) for layer in range(14, 27))
    assert counts[-6:] == (0,) * 6
    assert layer_counts(_set("pool", 9), 36, 6) == (9,) * 6
    assert layer_counts(None, 36, 6) == (36,) * 6
    # however few layers there are, the first sees what it is given
    assert layer_counts(_set("pyramid", 9), 36, 1) == (36,)
    assert layer_counts(_set("pyramid", 9), 36, 2) == (36, 9)
    assert layer_counts(_set("pyramid", 9), 36, 3)[::2] == (36, 9)


def test_merging_before_is_aims_by_its_definition() -> None:
    for count, keep in ((16, 4), (9, 7), (9, 4), (10, 1), (8, 8)):
        tokens = _random(2, count, 3, seed=count)
        found, places = merge_alternating(tokens, torch.arange(count).expand(2, -1), keep)
        assert found.shape == (2, keep, 3)
        for batch in range(2):
            left = [(place, tokens[batch, place]) for place in range(count)]
            while len(left) > keep:
                givers, takers = left[::2], left[1::2]
                pairs = []
                for place, token in givers:
                    cosines = [float(torch.cosine_similarity(token, other, dim=0)) for _, other in takers]
                    pairs.append((max(cosines), cosines.index(max(cosines)), place))
                chosen = sorted(pairs, key=lambda pair: -pair[0])[: min(len(left) - keep, len(left) // 2)]
                gone = {place for _, _, place in chosen}
                merged = []
                for number, (place, token) in enumerate(takers):
                    own = [dict(givers)[place] for _, goal, place in chosen if goal == number]
                    merged.append((place, torch.stack([token, *own]).mean(0)))
                left = sorted([*(pair for pair in givers if pair[0] not in gone), *merged], key=lambda pair: pair[0])
            assert places[batch].tolist() == [place for place, _ in left]
            torch.testing.assert_close(found[batch], torch.stack([token for _, token in left]))


def test_places_of_a_coarser_grid_are_the_middles_of_its_cells() -> None:
    assert even_places(6, 3).tolist() == [row * 6 + column for row in (1, 3, 5) for column in (1, 3, 5)]
    assert even_places(4, 3).tolist() == [row * 4 + column for row in (0, 2, 3) for column in (0, 2, 3)]
    assert even_places(5, 5).tolist() == list(range(25))
    tokens = _random(1, 36, 4)
    found, places = condense(_set("pool", 9), tokens, {})
    assert torch.equal(found, pool_grid(tokens, 3))
    assert torch.equal(places[0], even_places(6, 3))
    found, places = condense(_set("even", 9), tokens, {})
    assert torch.equal(found[0], tokens[0, places[0]])
    with pytest.raises(UsageError, match="places a side"):
        even_places(3, 4)


def test_attention_received_is_a_mean_over_heads_and_lookers() -> None:
    attention = _random(2, 3, 5, 5).softmax(-1)
    for batch in range(2):
        for token in range(4):
            every = [float(attention[batch, head, i, 1 + token]) for head in range(3) for i in range(5)]
            assert float(received_scores(attention, 1)[batch, token]) == pytest.approx(sum(every) / 15)


def test_attention_maps_are_those_the_tower_computes_with(model: Vlm) -> None:
    pixels, vision = _pixels(2), model.vision
    assert vision.has_class_token
    trunk = cast(Any, vision.trunk)
    given: list[tuple[Tensor, Tensor]] = []
    hook = trunk.blocks[1].attn.register_forward_hook(lambda _, args, made: given.append((args[0], made)))
    with torch.no_grad():
        features, maps = vision.watch(pixels)
        hook.remove()
        torch.testing.assert_close(features, vision(pixels))
        assert len(maps) == len(trunk.blocks)
        assert [one.shape for one in maps] == [(2, maps[0].shape[1], 17, 17)] * len(maps)
        attention = trunk.blocks[1].attn
        x, made = given[0]
        values = attention.qkv(x).view(2, 17, 3, attention.num_heads, -1)[:, :, 2].transpose(1, 2)
        mixed = (maps[1] @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.proj(attention.norm(mixed)), made)
        # the place that a score names is the token's
        model.reduce_tokens(_set("top", 1, score="cls"))
        seen = model.look(pixels)
        best = maps[max(len(maps) - 2, 0)][:, :, 0, 1:].mean(1).argmax(1)
        assert model.show(seen).places[:, 0].tolist() == best.tolist()
    assert all(block.attn.fused_attn for block in trunk.blocks)
    plain = VisionTower(VisionConfig(backbone="test_efficientnet", size=64))
    assert not plain.has_attention
    with pytest.raises(UsageError, match="no blocks of global attention"):
        plain.watch(pixels)


class _Prefill(nn.Module):
    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.prefill(self.model.show(self.model.look(pixels)), ids, length)


class _Step(nn.Module):
    def __init__(self, model: Vlm) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        model = self.model
        return model.decoder.step(x, at, keys, values, back=model.back, renumber=model.renumbers)[0]


@pytest.mark.parametrize("reduction", [_set("top", 5, score="cls"), _set("pyramid", 2), _set("aim", 6)], ids=_name)
def test_prefill_and_step_export_with_static_shapes(model: Vlm, reduction: Reduction) -> None:
    model.reduce_tokens(reduction)
    ids = torch.tensor([[*model.prompt_ids("What is this?"), 0, 0]])
    given = (_pixels(1), ids, torch.tensor([ids.shape[1] - 2]))
    module = _Prefill(model).eval()
    exported = torch.export.export(module, given)
    other = (_pixels(1, seed=7), ids, given[2])
    for inputs in (given, other):
        for found, expected in zip(exported.module()(*inputs), module(*inputs)):
            torch.testing.assert_close(found, expected)
    last, keys, values = module(*given)
    step = (last[:, None], torch.tensor([[model.text_start + 5]]), keys, values)
    torch.testing.assert_close(torch.export.export(_Step(model), step).module()(*step), _Step(model)(*step))


@pytest.mark.parametrize(
    "reduction", [None, _set("pool", 4), _set("pyramid", 2), _set("aim", 6)], ids=["all", "pool", "pyramid", "aim"]
)
def test_operations_are_those_that_torch_counts(model: Vlm, reduction: Reduction | None) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fused = build_vlm(VlmConfig.model_validate(VALUES | {"connector": "fusion"}), TOKENIZER, seed=3).eval()
    model.reduce_tokens(reduction)
    for one in (model, fused):
        ids = torch.tensor([one.prompt_ids("What is this?")])
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            shown = one.show(one.look(_pixels(1)))
            with FlopCounterMode(display=False) as counter:
                one.decoder.logits(one.prefill(shown, ids, torch.tensor([ids.shape[1]]))[0])
        assert counter.get_total_flops() == decoder_flops(one, ids.shape[1])


@pytest.mark.parametrize(
    "reduction",
    [
        _set("pool", 4),
        _set("even", 9),
        _set("top", 5, positions="renumbered"),
        _set("merge", 5, positions="renumbered"),
    ],
    ids=_name,
)
def test_what_is_exported_needs_no_more_than_places(model: Vlm, reduction: Reduction) -> None:
    model.reduce_tokens(reduction)
    pixels, prompt = _pixels(1, seed=4), "is a small dolphin this?"
    baked = model.for_export()
    ids = torch.tensor([model.prompt_ids(prompt)])
    with torch.no_grad():
        x = torch.cat([baked.picture(pixels), baked.decoder.embed_tokens(ids)], dim=1)
        keys, values = baked.decoder.empty_cache(1)
        hidden, keys, values = baked.decoder.step(x, torch.arange(x.shape[1])[None], keys, values, baked.prefix - 1)
        last, _, _ = model.prefill(model.show(model.look(pixels)), ids, torch.tensor([ids.shape[1]]))
        torch.testing.assert_close(hidden[:, -1], last)
        said: list[int] = []
        while len(said) < 5 and (token := int(baked.decoder.logits(hidden[0, -1]).argmax())) != 2:
            word = baked.decoder.embed_tokens(torch.tensor([[token]]))
            place = torch.tensor([[x.shape[1] + len(said)]])
            hidden, keys, values = baked.decoder.step(word, place, keys, values)
            said.append(token)
    assert model.generate(pixels, [prompt], max_new_tokens=5) == [model.tokenizer.decode(said)]
    assert baked.generate(pixels, [prompt], max_new_tokens=5) == [model.tokenizer.decode(said)]
    # no place of the cache is beyond the positions that there are
    assert keys.shape[3] == len(baked.decoder.cos) == 48 - (0 if baked is model else 16 - reduction.keep)


def test_what_places_cannot_say_is_not_exported(model: Vlm) -> None:
    assert model.for_export() is model
    for reduction in (_set("pyramid", 2), _set("aim", 4, positions="renumbered"), _set("top", 5), _set("merge", 5)):
        model.reduce_tokens(reduction)
        with pytest.raises(UsageError, match=f"reduction '{reduction.method}' and positions {reduction.positions}"):
            model.for_export()
    fused = build_vlm(VlmConfig.model_validate(VALUES | {"connector": "fusion"}), TOKENIZER)
    with pytest.raises(UsageError, match="connector 'fusion'"):
        fused.for_export()


def test_a_reduction_is_saved_and_older_files_have_none(model: Vlm, tmp_path: Any) -> None:
    model.reduce_tokens(_set("aim", 6))
    again = load_vlm(save_vlm(model, tmp_path / "saved"))
    assert again.reduction == model.reduction
    assert again.generate(_pixels(1), ["What is this?"]) == model.generate(_pixels(1), ["What is this?"])
    old = VlmConfig.model_validate(VALUES)
    assert (old.connector, old.reduction) == ("mlp", None)


def test_settings_that_cannot_be_are_refused_in_a_sentence(model: Vlm) -> None:
    for reduction, said in [
        (_set("top", 17), "was to keep 17 visual tokens but the connector gives 16"),
        (_set("rows", 6), "cannot keep 6 of 16 tokens"),
        (_set("pool", 9), "keep one of 1, 4, 16"),
        (_set("connector", 4), "was asked for 4 tokens but gives 16"),
        (_set("pool", 4, schedule=(4, 4, 4, 4)), "was given a schedule"),
        (_set("pyramid", 4, schedule=(16, 4, 4)), "gives|schedule"),
        (_set("pyramid", 4, schedule=(16, 4, 5, 4)), "never grow"),
        (_set("aim", 4, schedule=(16, 4, 4, 4)), "begin with 4"),
    ]:
        with pytest.raises(UsageError, match=said):
            model.reduce_tokens(reduction)
        assert model.reduction is None
    packed = VALUES | {"vision": {"backbone": "test_efficientnet", "size": 192}, "connector": "tokenpacker"}
    plain = build_vlm(VlmConfig.model_validate(packed), TOKENIZER)
    for reduction, said in [
        (_set("even", 4), "chooses among the places"),
        (_set("top", 1, score="cls"), "chooses among the places"),
    ]:
        with pytest.raises(UsageError, match=said):
            plain.reduce_tokens(reduction)
    plain = build_vlm(VlmConfig.model_validate(packed | {"connector": "mlp"}), TOKENIZER)
    with pytest.raises(UsageError, match="asked of a tower that gives distinct"):
        plain.reduce_tokens(_set("top", 4, score="cls"))
