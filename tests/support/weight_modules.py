"""Attention layers of other libraries with random weights: the judges of the layouts of `mha_spec.weights`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import alibi_slopes
from mha_spec.weights import layouts, load_weights
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Array = numpy.ndarray

BATCH, Q_LEN, KV_LEN = 2, 5, 7


# The modules of the libraries, each with random weights, its state and its output.


@dataclass
class Module:
    """One attention layer of a library: how it is loaded, and what it gave."""

    layout: str
    state: Any
    inputs: tuple[Array, Array, Array]
    output: Array
    heads: int | None = None
    prefix: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> dict[str, Any]:
        return load_weights(self.state, self.layout, heads=self.heads, prefix=self.prefix)


MODULES: dict[str, Callable[[], Module]] = {}


def module(build: Callable[..., Module]) -> Callable[..., Module]:
    MODULES[build.__name__] = build
    return build


def numbers(*shape: int, seed: int = 0) -> Array:
    return numpy.random.default_rng([seed, *shape]).normal(scale=0.25, size=shape).astype(numpy.float32)


def sequences(embed: int, k_embed: int | None = None, v_embed: int | None = None) -> tuple[Array, Array, Array]:
    k_embed, v_embed = k_embed or embed, v_embed or k_embed or embed
    return (
        numbers(BATCH, Q_LEN, embed, seed=1),
        numbers(BATCH, KV_LEN, k_embed, seed=2),
        numbers(BATCH, KV_LEN, v_embed, seed=3),
    )


def filled(shapes: Mapping[str, Any]) -> dict[str, Array]:
    return {name: numbers(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def torch_module(layout: str, *, bias: bool = True, **sizes: int) -> Module:
    import torch

    layer = torch.nn.MultiheadAttention(15, 3, bias=bias, batch_first=True, **sizes)
    state = filled({name: tensor.shape for name, tensor in layer.state_dict().items()})
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    inputs = sequences(15, sizes.get("kdim"), sizes.get("vdim"))
    output = layer(*(torch.from_numpy(array) for array in inputs))[0]
    return Module(layout, layer.state_dict(), inputs, to_numpy(output), heads=3)


@module
def torch_packed() -> Module:
    return torch_module("torch")


@module
def torch_packed_without_bias() -> Module:
    return torch_module("torch", bias=False)


@module
def torch_separate() -> Module:
    return torch_module("torch_separate", kdim=7, vdim=11)


def keras_module(layout: str, layer: Any, inputs: tuple[Array, Array, Array], *, listed: bool) -> Module:
    import keras

    layer.build(query_shape=inputs[0].shape, value_shape=inputs[2].shape, key_shape=inputs[1].shape)
    state = filled({weight.path: weight.shape for weight in layer.weights})
    layer.set_weights(list(state.values()))
    output = keras.ops.convert_to_numpy(layer(inputs[0], inputs[2], key=inputs[1]))
    if listed:
        return Module(layout, layer.get_weights(), inputs, output)
    return Module(layout, {weight.path: weight.numpy() for weight in layer.weights}, inputs, output, prefix=layer.name)


@module
def keras_multi_head() -> Module:
    import keras

    layer = keras.layers.MultiHeadAttention(3, 5, 7, output_shape=11)
    return keras_module("keras", layer, sequences(13, 17, 19), listed=True)


@module
def keras_multi_head_without_bias() -> Module:
    import keras

    layer = keras.layers.MultiHeadAttention(3, 5, 7, use_bias=False)
    return keras_module("keras", layer, sequences(13), listed=True)


@module
def keras_group_query() -> Module:
    import keras

    layer = keras.layers.GroupQueryAttention(5, 6, 2, name="grouped")
    return keras_module("keras_grouped", layer, sequences(13, 17, 19), listed=False)


@module
def flax_linen() -> Module:
    import jax
    from flax import linen

    layer = linen.MultiHeadDotProductAttention(num_heads=3, qkv_features=15, out_features=11)
    inputs = sequences(13, 17, 19)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)
    seeds = iter(range(100))
    state = jax.tree.map(lambda leaf: jax.numpy.asarray(numbers(*leaf.shape, seed=next(seeds))), shapes)
    return Module("flax_linen", state, inputs, to_numpy(layer.apply(state, *inputs)), prefix="params")


@module
def flax_nnx() -> Module:
    import jax
    from flax import nnx

    layer = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(
            6, 13, 30, 11, num_kv_heads=2, in_kv_features=17, decode=False, dropout_rate=0.1, rngs=nnx.Rngs(0)
        )
    )
    seeds = iter(range(100))
    shapes = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    state = jax.tree.map(lambda leaf: jax.numpy.asarray(numbers(*leaf.shape, seed=next(seeds))), shapes)
    nnx.update(layer, state)
    inputs = sequences(13, 17)
    output = layer(*(jax.numpy.asarray(array) for array in inputs), deterministic=True)
    return Module("flax_nnx", nnx.to_pure_dict(nnx.state(layer, nnx.Param)), inputs, to_numpy(output))


@module
def equinox() -> Module:
    import equinox
    import jax

    layer = equinox.filter_eval_shape(
        equinox.nn.MultiheadAttention, 3, 13, 17, 19, 11, 5, 7, True, False, True, True, key=jax.random.key(0)
    )
    shapes, rest = equinox.partition(layer, lambda leaf: hasattr(leaf, "shape"))
    seeds = iter(range(100))
    arrays = jax.tree.map(lambda leaf: jax.numpy.asarray(numbers(*leaf.shape, seed=next(seeds))), shapes)
    layer = equinox.combine(arrays, rest)
    state = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(equinox.filter(layer, equinox.is_array))
    }
    inputs = sequences(13, 17, 19)
    return Module("equinox", state, inputs, to_numpy(jax.vmap(layer)(*inputs)), heads=3)


@cache
def transformer(family: str, **sizes: int) -> Any:
    """A model of transformers with random weights that are not small."""
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
    """What is added to the scores of pairs that may not attend."""
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
    return transformer_module("llama", model, "layers.1.self_attn", 6, 18, lambda x: llama_output(model, x))


@module
def llama_meta() -> Module:
    """The state as it was before Hugging Face's conversion moved the pairs."""
    model = transformer("Llama", **LLAMA)
    found = transformer_module("llama_meta", model, "layers.1.attention", 6, 18, lambda x: llama_output(model, x))
    state = {name.removeprefix("layers.1.self_attn."): to_numpy(array) for name, array in found.state.items()}

    def moved(weight: Array, heads: int) -> Array:
        return weight.reshape(heads, 2, 5, 18).swapaxes(1, 2).reshape(heads * 10, 18)

    found.state = {
        "layers.1.attention.wq.weight": moved(state["q_proj.weight"], 6),
        "layers.1.attention.wk.weight": moved(state["k_proj.weight"], 2),
        "layers.1.attention.wv.weight": state["v_proj.weight"],
        "layers.1.attention.wo.weight": state["o_proj.weight"],
    }
    return found


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
    """The weights of transformers' ViT, under the names that timm gives them, fused."""
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
    found = transformer_module("vit_timm", model, "blocks.1.attn", 3, 21, lambda x: model.layers[1].attention(x)[0])
    found.state = vit_state(model)
    return found


@module
def vit_timm_by_hand() -> Module:
    """timm's forward: one matrix for all three, split into three, then into heads."""
    import torch

    state = {name: torch.from_numpy(array) for name, array in vit_timm().state.items()}
    own = {name.removeprefix("blocks.1.attn."): tensor for name, tensor in state.items()}
    query = sequences(21)[0]
    fused = torch.from_numpy(query) @ own["qkv.weight"].T + own["qkv.bias"]
    q, k, v = fused.unflatten(-1, (3, 3, 7)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / math.sqrt(7)).softmax(-1)
    output = (weights @ v).transpose(1, 2).flatten(2) @ own["proj.weight"].T + own["proj.bias"]
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
    found = transformer_module(
        "whisper",
        model,
        "decoder.layers.0.encoder_attn.",
        7,
        42,
        lambda x: layer(x, key_value_states=torch.from_numpy(key))[0],
    )
    found.inputs = (query, key, key)
    return found


@module
def whisper_openai() -> Module:
    """The weights of Hugging Face's Whisper under the names that OpenAI gives them."""
    renamed = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    hugging_face = built("whisper_encoder")
    state = {
        f"encoder.blocks.0.attn.{renamed[part]}.{kind}": tensor
        for name, tensor in hugging_face.state.items()
        if name.startswith("encoder.layers.0.self_attn.")
        for part, kind in [name.split(".")[-2:]]
    }
    return replace(hugging_face, layout="whisper_openai", state=state, prefix="encoder.blocks.0.attn")


@module
def bart() -> Module:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in BART.items()}
    model = transformer("Bart", vocab_size=11, d_model=21, max_position_embeddings=13, **sizes)
    layer = model.encoder.layers[0].self_attn
    return transformer_module("bart", model, "encoder.layers.0.self_attn", 3, 21, lambda x: layer(x)[0])


BART = {"layers": 1, "attention_heads": 3, "ffn_dim": 5}


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
    """The linear bias as BLOOM and Falcon take it, slope times the position of the key, and as attention takes it."""
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
    """The weights of Qwen3, fused kv head by kv head as Megatron Core has them."""
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


@cache
def built(name: str) -> Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries warn of on import and on construction is not ours
        return MODULES[name]()
