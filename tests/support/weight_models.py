"""Attention layers of the models of transformers; importing this module adds them to `MODULES` of `weight_modules`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import alibi_slopes
from mha_spec.weights import layouts
from mha_spec_conformance.targets.conversion import to_numpy

from .weight_modules import BATCH, Q_LEN, Module, built, filled, module, sequences

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = numpy.ndarray


@cache
def transformer(family: str, **sizes: int) -> Any:
    """Build a model of transformers with random weights that are not small."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}Model")(config).eval()
    state = filled({name: tensor.shape for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model


def transformer_module(
    layout: str, model: Any, prefix: str, heads: int, embed: int, call: Callable[[Any], Any], **options: Any
) -> Module:
    import torch

    query = sequences(embed)[0]
    with torch.no_grad():
        output = to_numpy(call(torch.from_numpy(query)))
    return Module(layout, model.state_dict(), (query, query, query), output, heads, prefix, options)


def hidden_future() -> Any:
    """Return the numbers that are added to the scores to hide later keys."""
    import torch

    return torch.full((1, 1, Q_LEN, Q_LEN), torch.finfo(torch.float32).min).triu(1)


@module
def bert() -> Module:
    model = transformer(
        "Bert", vocab_size=11, hidden_size=21, num_hidden_layers=2, num_attention_heads=3, intermediate_size=5
    )
    layer = model.encoder.layer[1].attention
    return transformer_module(
        "bert", model, "encoder.layer.1.attention", 3, 21, lambda x: layer.output.dense(layer.self(x)[0])
    )


@module
def gpt2() -> Module:
    model = transformer("GPT2", vocab_size=11, n_embd=21, n_layer=2, n_head=3, n_positions=13)
    layer = model.h[1].attn
    return transformer_module("gpt2", model, "h.1.attn", 3, 21, lambda x: layer(x, attention_mask=hidden_future())[0])


LLAMA = {
    "vocab_size": 11,
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 7,
}


def llama_output(model: Any, x: Any) -> Any:
    import torch

    positions = model.rotary_emb(x, torch.arange(Q_LEN)[None])
    return model.layers[1].self_attn(x, position_embeddings=positions, attention_mask=hidden_future())[0]


@module
def llama() -> Module:
    model = transformer("Llama", **LLAMA, attention_bias=True)
    return transformer_module("llama", model, "layers.1.self_attn", 6, 18, lambda x: llama_output(model, x))


@module
def qwen3() -> Module:
    model = transformer("Qwen3", **LLAMA)
    return transformer_module("qwen3", model, "layers.1.self_attn", 6, 18, lambda x: llama_output(model, x))


@module
def gemma3() -> Module:
    """Round the weights of the norms, so that 1 + weight - 1 is the weight."""
    import torch

    model = transformer("Gemma3Text", **LLAMA, query_pre_attn_scalar=17)
    positions = model.rotary_emb(torch.zeros(1), torch.arange(Q_LEN)[None], "sliding_attention")
    layer = model.layers[1].self_attn
    for norm in (layer.q_norm, layer.k_norm):
        norm.weight.data = (norm.weight * 1024).round() / 1024
    return transformer_module(
        "gemma3",
        model,
        "layers.1.self_attn",
        6,
        18,
        lambda x: layer(x, position_embeddings=positions, attention_mask=hidden_future())[0],
        scale=17**-0.5,
    )


@module
def olmo2() -> Module:
    model = transformer(
        "Olmo2", **{name: size for name, size in LLAMA.items() if name != "head_dim"} | {"hidden_size": 60}
    )
    return transformer_module(
        "olmo2", model, "layers.1.self_attn", 6, 60, lambda x: llama_output(model, x), norm_epsilon=1e-5
    )


@module
def phi3() -> Module:
    model = transformer(
        "Phi3", **{name: size for name, size in LLAMA.items() if name != "head_dim"} | {"hidden_size": 60}
    )
    return transformer_module("phi3", model, "layers.1.self_attn", 6, 60, lambda x: llama_output(model, x))


@module
def llama_meta() -> Module:
    """Undo Hugging Face's conversion, which reorders the pairs."""
    model = transformer("Llama", **LLAMA)
    converted = transformer_module("llama_meta", model, "layers.1.attention", 6, 18, lambda x: llama_output(model, x))
    state = {name.removeprefix("layers.1.self_attn."): to_numpy(array) for name, array in converted.state.items()}

    def interleaved(weight: Array, heads: int) -> Array:
        return weight.reshape(heads, 2, 5, 18).swapaxes(1, 2).reshape(heads * 10, 18)

    original = {
        "wq.weight": interleaved(state["q_proj.weight"], 6),
        "wk.weight": interleaved(state["k_proj.weight"], 2),
        "wv.weight": state["v_proj.weight"],
        "wo.weight": state["o_proj.weight"],
    }
    return replace(converted, state={f"layers.1.attention.{name}": array for name, array in original.items()})


def t5_model() -> Any:
    return transformer("T5", vocab_size=11, d_model=13, d_kv=5, num_heads=3, num_layers=1, d_ff=7)


@module
def t5() -> Module:
    layer = t5_model().encoder.block[0].layer[0].SelfAttention
    bias = to_numpy(layer.compute_bias(Q_LEN, Q_LEN))
    return transformer_module(
        "t5", t5_model(), "encoder.block.0.layer.0.SelfAttention", 3, 13, lambda x: layer(x)[0], bias=bias
    )


def vit_state(model: Any) -> dict[str, Array]:
    """Fuse the weights of transformers' ViT under the names of timm."""
    state = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
    return {
        f"blocks.1.attn.{name}.{kind}": numpy.concatenate(
            [state[f"layers.1.attention.{part}_proj.{kind}"] for part in parts]
        )
        for name, parts in {"qkv": "qkv", "proj": "o"}.items()
        for kind in ("weight", "bias")
    }


@module
def vit_timm() -> Module:
    model = transformer(
        "ViT",
        hidden_size=21,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=5,
        image_size=4,
        patch_size=2,
    )
    layer = model.layers[1].attention
    separate = transformer_module("vit_timm", model, "blocks.1.attn", 3, 21, lambda x: layer(x)[0])
    return replace(separate, state=vit_state(model))


@module
def vit_timm_by_hand() -> Module:
    """Compute the layer as timm does: multiply by the fused matrix, then split the product into q, k, v and heads."""
    import torch

    state = {name: torch.from_numpy(array) for name, array in vit_timm().state.items()}
    weight = {name.removeprefix("blocks.1.attn."): tensor for name, tensor in state.items()}
    query = sequences(21)[0]
    fused = torch.from_numpy(query) @ weight["qkv.weight"].T + weight["qkv.bias"]
    q, k, v = fused.unflatten(-1, (3, 3, 7)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(7)).softmax(-1)
    output = (weights @ v).transpose(1, 2).flatten(2) @ weight["proj.weight"].T + weight["proj.bias"]
    return Module("vit_timm", state, (query, query, query), to_numpy(output), 3, "blocks.1.attn")


def whisper_model() -> Any:
    return transformer(
        "Whisper",
        vocab_size=11,
        d_model=42,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=7,
        encoder_ffn_dim=5,
        decoder_ffn_dim=5,
        num_mel_bins=4,
        max_source_positions=5,
        max_target_positions=5,
        decoder_start_token_id=1,
    )


@module
def whisper_encoder() -> Module:
    model = whisper_model()
    layer = model.encoder.layers[0].self_attn
    return transformer_module("whisper", model, "encoder.layers.0.self_attn", 3, 42, lambda x: layer(x)[0])


@module
def whisper_cross() -> Module:
    import torch

    model, (query, key, _) = whisper_model(), sequences(42)
    layer = model.decoder.layers[0].encoder_attn
    decoder = transformer_module(
        "whisper",
        model,
        "decoder.layers.0.encoder_attn.",
        7,
        42,
        lambda x: layer(x, key_value_states=torch.from_numpy(key))[0],
    )
    return replace(decoder, inputs=(query, key, key))


@module
def whisper_openai() -> Module:
    """Rename the weights of Hugging Face's Whisper as OpenAI names them."""
    renamed = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    hugging_face = built("whisper_encoder")
    state = {
        f"encoder.blocks.0.attn.{renamed[part]}.{kind}": tensor
        for name, tensor in hugging_face.state.items()
        if name.startswith("encoder.layers.0.self_attn.")
        for part, kind in [name.split(".")[-2:]]
    }
    return replace(hugging_face, layout="whisper_openai", state=state, prefix="encoder.blocks.0.attn")


BART = {"layers": 1, "attention_heads": 3, "ffn_dim": 5}


@module
def bart() -> Module:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in BART.items()}
    model = transformer("Bart", vocab_size=11, d_model=21, max_position_embeddings=13, **sizes)
    layer = model.encoder.layers[0].self_attn
    return transformer_module("bart", model, "encoder.layers.0.self_attn", 3, 21, lambda x: layer(x)[0])


@module
def gpt_neox() -> Module:
    import torch

    model = transformer(
        "GPTNeoX",
        vocab_size=11,
        hidden_size=42,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=5,
        rotary_pct=0.43,
    )
    positions = model.rotary_emb(torch.zeros(1), torch.arange(Q_LEN)[None])
    layer = model.layers[1].attention
    return transformer_module(
        "gpt_neox",
        model,
        "layers.1.attention",
        3,
        42,
        lambda x: layer(x, attention_mask=hidden_future(), position_embeddings=positions)[0],
        rotary={"rotary_dim": positions[0].shape[-1]},
    )


def alibi(heads: int) -> tuple[Any, Array]:
    """Return the linear bias, slope times the position of the key, in the shapes that BLOOM and attention take."""
    import torch

    slopes = alibi_slopes(heads)
    by_key = slopes[:, None, None] * numpy.arange(Q_LEN, dtype=numpy.float32)
    return torch.from_numpy(numpy.tile(by_key, (BATCH, 1, 1))), by_key[None]


@module
def bloom() -> Module:
    import torch

    model = transformer("Bloom", vocab_size=11, hidden_size=21, n_layer=2, n_head=3)
    layer, (theirs, ours) = model.h[1].self_attention, alibi(3)
    residual = torch.zeros(BATCH, Q_LEN, 21)
    return transformer_module(
        "bloom",
        model,
        "h.1.self_attention",
        3,
        21,
        lambda x: layer(x, residual=residual, alibi=theirs, attention_mask=hidden_future())[0],
        bias=ours,
    )


def falcon_module(**config: Any) -> Module:
    import torch

    model = transformer("Falcon", vocab_size=11, hidden_size=60, num_hidden_layers=2, num_attention_heads=6, **config)
    positions = model.rotary_emb(torch.zeros(1), torch.arange(Q_LEN)[None])
    layer = model.h[1].self_attention
    return transformer_module(
        "falcon",
        model,
        "h.1.self_attention",
        6,
        60,
        lambda x: layer(x, alibi=None, attention_mask=hidden_future(), position_embeddings=positions)[0],
        rotary={},
    )


@module
def falcon_of_groups() -> Module:
    return falcon_module(new_decoder_architecture=True, num_kv_heads=2, bias=True)


@module
def falcon_of_one_kv_head() -> Module:
    return falcon_module(new_decoder_architecture=False, multi_query=True)


@module
def falcon_without_groups() -> Module:
    return falcon_module(new_decoder_architecture=False, multi_query=False)


@module
def megatron() -> Module:
    """Fuse the weights of Qwen3 kv head by kv head, as Megatron Core does."""
    qwen = built("qwen3")
    state = {name.removeprefix(f"{qwen.prefix}."): to_numpy(tensor) for name, tensor in qwen.state.items()}
    query, key, value = (state[f"{part}_proj.weight"].reshape(-1, 10, 18) for part in "qkv")
    rows = [row for group in range(2) for row in (*query[3 * group : 3 * group + 3], key[group], value[group])]
    fused = {
        "linear_qkv.weight": numpy.concatenate(rows),
        "linear_proj.weight": state["o_proj.weight"],
        "q_layernorm.weight": state["q_norm.weight"],
        "k_layernorm.weight": state["k_norm.weight"],
        "linear_qkv.layer_norm_weight": numpy.ones(18, numpy.float32),
    }
    prefix = "decoder.layers.1.self_attention"
    state = {f"{prefix}.{name}": array for name, array in fused.items()}
    options = dict(layouts()["llama"].options)
    return replace(qwen, layout="megatron", state=state, prefix=prefix, options=options)
