"""An existing CLIP (open_clip's or Hugging Face's) rebuilt as a student: same weights, same embeddings, our two towers.

The image tower becomes timm's vision transformer with CLIP's first norm, the text tower ours with causal attention and
`end_id` pooling. What the two cannot express is refused; callers compare the embeddings afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.build import assemble
from pocketvlm.students.config import ImageConfig, Projection, StudentConfig, TextConfig
from pocketvlm.students.student import Student

# a CLIP image tower in timm; its arguments give every other size
_BACKBONE = "vit_base_patch16_clip_224"
_EPS = 1e-5
_PROJECTION = Projection(bias=False)
State = dict[str, Tensor]


@torch.no_grad()
def student_from_clip(
    model: nn.Module,
    *,
    name: str,
    image: ImageSpec,
    tokenizer_json: bytes,
    end_id: int,
    logit_scale: float,
    licences: tuple[tuple[str, str, str], ...] = (),
) -> Student:
    """A CLIP with vision and text transformers as a student in eval mode, float32, on the CPU.

    Args:
        model: open_clip's CLIP or CustomTextCLIP, or transformers' CLIPModel. image, tokenizer_json: its
            preprocessing and its tokenizer. end_id: the token whose first place its text tower pools.

    Raises:
        UsageError: another architecture (SigLIP, a ResNet, other pooling, ...).
    """
    if hasattr(model, "visual"):
        vision, text = _open_clip_vision(model.visual), _open_clip_text(model)
    elif type(model).__name__ == "CLIPModel":
        vision, text = _hf_vision(model), _hf_text(model)
    else:
        raise _refused(f"another architecture than CLIP's ({type(model).__name__})")
    (image_values, image_state), (text_values, text_state) = vision, text
    config = StudentConfig(
        name=name,
        image=ImageConfig(
            backbone=_BACKBONE,
            size=image.size,
            mean=image.mean,
            std=image.std,
            resize=image.resize,
            filter=image.filter,
            crop_fraction=image.crop_fraction,
            backbone_args=image_values,
            projection=_PROJECTION,
        ),
        text=TextConfig(attention="causal", pool="eot", end_id=end_id, projection=_PROJECTION, **text_values),
        licences=licences,
        logit_scale=min(max(logit_scale, 1.0), 100.0),
    )
    dim = len(image_state["projection.first.weight"])
    student = assemble(config, dim, tokenizer_json, seed=0, space_id=None, load_weights=False)
    if student.image_spec != image:
        raise _refused("preprocessing with a background of its own")
    # tables are often padded to a round size; no text reaches the rows past the tokenizer's
    text_state["token.weight"] = text_state["token.weight"][: student.text_spec.vocab_size]
    for tower, state in ((student.image_tower, image_state), (student.text_tower, text_state)):
        own = tower.state_dict()
        odd = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
        if odd:
            raise _refused(f"other weights than these towers have (first at {odd[0]!r})")
        tower.load_state_dict(state)
    return student.eval()


def _refused(what: str) -> UsageError:
    return UsageError(
        f"the model has {what}, which the towers of a student cannot express; another model would be pruned, so "
        "give a CLIP with a vision transformer and a causal text transformer (open_clip's or Hugging Face's), or "
        "distil from this one without inheriting its weights"
    )


def _open_clip_vision(visual: Any) -> tuple[dict[str, Any], State]:
    if type(visual).__name__ != "VisionTransformer":
        raise _refused(f"the image tower {type(visual).__name__}")
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise _refused("another pooling than the class token's")
    blocks = visual.transformer.resblocks
    state = _open_clip_blocks(blocks) | {
        "patch_embed.proj.weight": visual.conv1.weight,
        "cls_token": visual.class_embedding[None, None],
        "pos_embed": visual.positional_embedding[None],
        **_norm("norm_pre", visual.ln_pre),
        **_norm("norm", visual.ln_post),
    }
    values = {
        **_shape(visual.conv1, blocks[0].attn.num_heads, len(blocks), blocks[0].mlp.c_fc),
        "act_layer": _activation(blocks[0].mlp.gelu),
    }
    return values, _image_state(state, visual.proj.T)


def _open_clip_text(model: Any) -> tuple[dict[str, Any], State]:
    tower = getattr(model, "text", model)
    for part in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
        if getattr(tower, part, None) is None:
            raise _refused(f"a text tower without {part} ({type(tower).__name__})")
    pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    if pool not in ("argmax", "eos") or tower.attn_mask is None or getattr(tower, "cls_emb", None) is not None:
        raise _refused("a text tower that is not causal or does not pool the end token")
    blocks = tower.transformer.resblocks
    projection = tower.text_projection
    if isinstance(projection, nn.Linear):
        raise _refused("a text projection with a layer of its own")
    values = _text_values(
        tower.positional_embedding,
        len(blocks),
        blocks[0].attn.num_heads,
        blocks[0].mlp.c_fc,
        _activation(blocks[0].mlp.gelu),
    )
    state = _open_clip_blocks(blocks) | {
        "token.weight": tower.token_embedding.weight,
        "position": tower.positional_embedding,
        **_norm("norm", tower.ln_final),
        "projection.first.weight": projection.T,
    }
    return values, _text_state(state)


def _open_clip_blocks(blocks: Any) -> State:
    """Under timm's names."""
    state: State = {}
    for number, block in enumerate(blocks):
        if type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.ls_1, nn.Identity):
            raise _refused(f"blocks of another kind ({type(block).__name__}, or with layer scale)")
        state |= {
            **_norm(f"blocks.{number}.norm1", block.ln_1),
            f"blocks.{number}.attn.qkv.weight": block.attn.in_proj_weight,
            f"blocks.{number}.attn.qkv.bias": block.attn.in_proj_bias,
            **_linear(f"blocks.{number}.attn.proj", block.attn.out_proj),
            **_norm(f"blocks.{number}.norm2", block.ln_2),
            **_linear(f"blocks.{number}.mlp.fc1", block.mlp.c_fc),
            **_linear(f"blocks.{number}.mlp.fc2", block.mlp.c_proj),
        }
    return state


def _hf_vision(model: Any) -> tuple[dict[str, Any], State]:
    tower = model.vision_model
    embeddings, layers = tower.embeddings, tower.encoder.layers
    state = _hf_blocks(layers) | {
        "patch_embed.proj.weight": embeddings.patch_embedding.weight,
        "cls_token": embeddings.class_embedding[None, None],
        "pos_embed": embeddings.position_embedding.weight[None],
        **_norm("norm_pre", tower.pre_layrnorm),
        **_norm("norm", tower.post_layernorm),
    }
    config = model.config.vision_config
    values = {
        **_shape(embeddings.patch_embedding, config.num_attention_heads, len(layers), layers[0].mlp.fc1),
        "act_layer": _named(config.hidden_act),
    }
    return values, _image_state(state, model.visual_projection.weight)


def _hf_text(model: Any) -> tuple[dict[str, Any], State]:
    tower, config = model.text_model, model.config.text_config
    positions = tower.embeddings.position_embedding.weight
    layers = tower.encoder.layers
    values = _text_values(
        positions, len(layers), config.num_attention_heads, layers[0].mlp.fc1, _named(config.hidden_act)
    )
    state = _hf_blocks(layers) | {
        "token.weight": tower.embeddings.token_embedding.weight,
        "position": positions,
        **_norm("norm", tower.final_layer_norm),
        "projection.first.weight": model.text_projection.weight,
    }
    return values, _text_state(state)


def _hf_blocks(layers: Any) -> State:
    """Under timm's names."""
    state: State = {}
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        state |= {
            **_norm(f"blocks.{number}.norm1", layer.layer_norm1),
            f"blocks.{number}.attn.qkv.weight": torch.cat([part.weight for part in parts]),
            f"blocks.{number}.attn.qkv.bias": torch.cat([part.bias for part in parts]),
            **_linear(f"blocks.{number}.attn.proj", attention.out_proj),
            **_norm(f"blocks.{number}.norm2", layer.layer_norm2),
            **_linear(f"blocks.{number}.mlp.fc1", layer.mlp.fc1),
            **_linear(f"blocks.{number}.mlp.fc2", layer.mlp.fc2),
        }
    return state


def _shape(patches: Any, heads: int, depth: int, fc1: nn.Linear) -> dict[str, Any]:
    """Arguments of timm's vision transformer."""
    width = patches.out_channels
    return {
        "patch_size": patches.kernel_size[0],
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": _ratio(fc1.out_features, width),
    }


def _text_values(positions: Tensor, layers: int, heads: int, fc1: nn.Linear, activation: str) -> dict[str, Any]:
    length, width = positions.shape
    ratio = _ratio(fc1.out_features, width)
    return {
        "layers": layers, "width": width, "heads": heads, "mlp_ratio": ratio, "context_length": length,
        "activation": activation,
    }  # fmt: skip


def _ratio(hidden: int, width: int) -> float:
    """int(width * ratio) == hidden, whatever the division rounds to."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return "gelu"
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    raise _refused(f"the activation {module}")


def _named(activation: str) -> str:
    if activation not in ("gelu", "quick_gelu"):
        raise _refused(f"the activation {activation!r}")
    return activation


def _norm(name: str, norm: Any) -> State:
    if not isinstance(norm, nn.LayerNorm) or abs(norm.eps - _EPS) > 1e-12:
        raise _refused(f"{norm} where a layer norm with eps {_EPS:g} is expected")
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}


def _linear(name: str, layer: nn.Linear) -> State:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def _image_state(state: State, projection: Tensor) -> State:
    named = {f"trunk.{key}": value for key, value in state.items()}
    return _float({**named, "projection.first.weight": projection})


def _text_state(state: State) -> State:
    ours = {".attn.qkv.": ".qkv.", ".attn.proj.": ".out.", ".mlp.": "."}
    found = {}
    for key, value in state.items():
        for theirs, name in ours.items():
            key = key.replace(theirs, name)
        found[key] = value
    return _float(found)


def _float(state: State) -> State:
    return {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
