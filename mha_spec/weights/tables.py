"""The names and shapes of the weights in other libraries' attention layers, in a table for each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from mha_spec.parameters import AXES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LAYOUTS", "Layout"]


@dataclass(frozen=True)
class Layout:
    """The names and axes of a library's attention layer, and the `params` that they hold.

    An axis is a name in `mha_spec.parameters.AXES`, or several names joined by `*`, which are merged, the outermost
    first. Where a tensor holds several params, they follow each other along their merged axis.
    """

    describes: str
    """The layer that the layout describes."""
    tensors: Mapping[str, Mapping[str, str]]
    """For each name, in the library's order, the params that it holds and the axes of each."""
    optional: tuple[tuple[str, ...], ...] = ()
    """Groups of names; a group may be absent as a whole."""
    equal_axes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Axes that always equal another axis in this layout, such as kv_heads and heads."""
    options: Mapping[str, object] = field(default_factory=dict[str, object])
    """Options with which multi_head_attention computes this layer."""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names of weights that params cannot hold, with the reason."""
    apart: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names within the layer that are ignored, with their meaning."""
    separator: str = "."
    """The separator of the parts of a name."""
    nested: bool = False
    """True if the library keeps its state in dictionaries of dictionaries."""
    ordered: bool = False
    """True if the library also returns its weights as a list, in the order of `tensors`."""
    by_kv_head: tuple[str, ...] = ()
    """Fused tensors that alternate: the queries, the key and the value of kv head 0, then those of kv head 1, ..."""
    one_less: tuple[str, ...] = ()
    """Gains that the library stores less 1; 1 is added when they are loaded."""


_LINEAR = {
    "w_q": "heads*qk_dim embed",
    "w_k": "kv_heads*qk_dim k_embed",
    "w_v": "kv_heads*v_dim v_embed",
    "w_o": "out heads*v_dim",
    "b_q": "heads*qk_dim",
    "b_k": "kv_heads*qk_dim",
    "b_v": "kv_heads*v_dim",
    "b_o": "out",
    "q_norm": "qk_dim",
    "k_norm": "qk_dim",
    "q_joint_norm": "heads*qk_dim",
    "k_joint_norm": "kv_heads*qk_dim",
}
_TRANSPOSED = _LINEAR | {
    "w_q": "embed heads*qk_dim",
    "w_k": "k_embed kv_heads*qk_dim",
    "w_v": "v_embed kv_heads*v_dim",
    "w_o": "heads*v_dim out",
}
_ONE_HEAD_COUNT = {"kv_heads": "heads"}
_ONE_SIZE = {"v_dim": "qk_dim"}
_SELF = {"k_embed": "embed", "v_embed": "embed"}


def _linear(*params: str) -> dict[str, str]:
    """The axes of weights that multiply from the right, (out, in), as in torch."""
    return {param: _LINEAR[param] for param in params}


def _transposed(*params: str) -> dict[str, str]:
    """The axes of weights that multiply from the left, (in, out)."""
    return {param: _TRANSPOSED[param] for param in params}


def _unmerged(param: str) -> dict[str, str]:
    """The axes of params itself."""
    return {param: " ".join(AXES[param])}


_TORCH_REFUSED = {
    name: f"add_bias_kv appends a learned {tensor} to the sequence, and params has only projections: append it "
    f"to the projected {tensor} yourself"
    for name, tensor in {"bias_k": "key", "bias_v": "value"}.items()
}
_GATE = "multiplies the heads' output by a sigmoid of the query, which params does not describe"
_LAYER_NORM = "normalises by LayerNorm, which subtracts the mean; q_norm and k_norm are gains of RMS normalisation"
_INVERSE_FREQUENCIES = "follows from the base of rotary="
_POST_NORM = "the LayerNorm of the block, after the residual"

_TORCH = Layout(
    describes="torch.nn.MultiheadAttention with a single embedding size",
    tensors={
        "in_proj_weight": _linear("w_q", "w_k", "w_v"),
        "in_proj_bias": _linear("b_q", "b_k", "b_v"),
        "out_proj.weight": _linear("w_o"),
        "out_proj.bias": _linear("b_o"),
    },
    optional=(("in_proj_bias", "out_proj.bias"),),
    equal_axes={**_SELF, **_ONE_HEAD_COUNT, **_ONE_SIZE, "out": "embed"},
    refused=_TORCH_REFUSED,
)
_TORCH_SEPARATE = Layout(
    describes="torch.nn.MultiheadAttention with kdim or vdim",
    tensors={
        "q_proj_weight": _linear("w_q"),
        "k_proj_weight": _linear("w_k"),
        "v_proj_weight": _linear("w_v"),
        "in_proj_bias": _linear("b_q", "b_k", "b_v"),
        "out_proj.weight": _linear("w_o"),
        "out_proj.bias": _linear("b_o"),
    },
    optional=(("in_proj_bias", "out_proj.bias"),),
    equal_axes={**_ONE_HEAD_COUNT, **_ONE_SIZE, "out": "embed"},
    refused=_TORCH_REFUSED,
)

_KERAS_TENSORS = {
    f"{part}/{kind}": _unmerged(f"{letter}_{end}")
    for part, end in {"query": "q", "key": "k", "value": "v", "attention_output": "o"}.items()
    for kind, letter in {"kernel": "w", "bias": "b"}.items()
}
_KERAS_BIASES = (tuple(name for name in _KERAS_TENSORS if name.endswith("bias")),)
_KERAS_REFUSED = {f"gate/{kind}": f"use_gate {_GATE}" for kind in ("kernel", "bias")}
_KERAS = Layout(
    describes="keras.layers.MultiHeadAttention",
    tensors=_KERAS_TENSORS,
    optional=_KERAS_BIASES,
    equal_axes=_ONE_HEAD_COUNT,
    refused=_KERAS_REFUSED,
    separator="/",
    ordered=True,
)
_KERAS_GROUPED = Layout(
    describes="keras.layers.GroupQueryAttention",
    tensors=_KERAS_TENSORS,
    optional=_KERAS_BIASES,
    equal_axes={**_ONE_SIZE, "out": "embed"},
    refused=_KERAS_REFUSED,
    separator="/",
    ordered=True,
)

_FLAX_TENSORS = {name.replace("attention_output", "out"): holds for name, holds in _KERAS_TENSORS.items()}
_FLAX_BIASES = (tuple(name for name in _FLAX_TENSORS if name.endswith("bias")),)
_FLAX_REFUSED = {f"{part}_ln/scale": f"normalize_qk {_LAYER_NORM}" for part in ("query", "key")}
_FLAX_LINEN = Layout(
    describes="flax.linen.MultiHeadDotProductAttention",
    tensors=_FLAX_TENSORS,
    optional=_FLAX_BIASES,
    equal_axes={**_ONE_HEAD_COUNT, **_ONE_SIZE},
    refused=_FLAX_REFUSED,
    separator="/",
    nested=True,
)
_FLAX_NNX = Layout(
    describes="flax.nnx.MultiHeadAttention",
    tensors=_FLAX_TENSORS,
    optional=_FLAX_BIASES,
    equal_axes={**_ONE_SIZE, "v_embed": "k_embed"},
    refused=_FLAX_REFUSED,
    separator="/",
    nested=True,
)

_EQUINOX_TENSORS = {
    f"{part}_proj.{kind}": _linear(f"{letter}_{end}")
    for part, end in {"query": "q", "key": "k", "value": "v", "output": "o"}.items()
    for kind, letter in {"weight": "w", "bias": "b"}.items()
}
_EQUINOX = Layout(
    describes="equinox.nn.MultiheadAttention",
    tensors=_EQUINOX_TENSORS,
    optional=tuple((name,) for name in _EQUINOX_TENSORS if name.endswith("bias")),
    equal_axes=_ONE_HEAD_COUNT,
)

_BERT = Layout(
    describes="BERT",
    tensors={
        f"{part}.{kind}": _linear(f"{letter}_{end}")
        for part, end in {"self.query": "q", "self.key": "k", "self.value": "v", "output.dense": "o"}.items()
        for kind, letter in {"weight": "w", "bias": "b"}.items()
    },
    equal_axes={**_ONE_HEAD_COUNT, **_ONE_SIZE},
    refused={"self.distance_embedding.weight": "relative positions add to the scores a term that params lacks"},
    apart={f"output.LayerNorm.{name}": _POST_NORM for name in ("weight", "bias", "gamma", "beta")},
)
_GPT2 = Layout(
    describes="GPT-2",
    tensors={
        "c_attn.weight": _transposed("w_q", "w_k", "w_v"),
        "c_attn.bias": _transposed("b_q", "b_k", "b_v"),
        "c_proj.weight": _transposed("w_o"),
        "c_proj.bias": _transposed("b_o"),
    },
    equal_axes={**_SELF, **_ONE_HEAD_COUNT, **_ONE_SIZE},
    options={"causal": True},
    apart={"bias": "the causal mask", "masked_bias": "the number that the causal mask writes"},
)
_LLAMA = Layout(
    describes="Llama as Hugging Face names it",
    tensors={
        **{f"{part}_proj.weight": _linear(f"w_{part}") for part in "qkvo"},
        **{f"{part}_proj.bias": _linear(f"b_{part}") for part in "qkvo"},
    },
    optional=(("q_proj.bias", "k_proj.bias", "v_proj.bias"), ("o_proj.bias",)),
    equal_axes=_ONE_SIZE,
    options={"causal": True, "rotary": {}},
    apart={"rotary_emb.inv_freq": _INVERSE_FREQUENCIES},
)
# Three norms have the names q_norm.weight and k_norm.weight. Each has a layout, so that the caller chooses.
_QWEN3 = replace(
    _LLAMA,
    describes="Qwen3",
    tensors={**_LLAMA.tensors, **{f"{part}_norm.weight": _linear(f"{part}_norm") for part in "qk"}},
)
_GEMMA3 = replace(_QWEN3, describes="Gemma 3", one_less=("q_norm", "k_norm"))
_OLMO2 = replace(
    _LLAMA,
    describes="OLMo 2",
    tensors={**_LLAMA.tensors, **{f"{part}_norm.weight": _linear(f"{part}_joint_norm") for part in "qk"}},
)
_PHI3 = Layout(
    describes="Phi-3",
    tensors={"qkv_proj.weight": _linear("w_q", "w_k", "w_v"), "o_proj.weight": _linear("w_o")},
    equal_axes={**_SELF, **_ONE_SIZE},
    options={"causal": True, "rotary": {}},
    apart={"rotary_emb.inv_freq": _INVERSE_FREQUENCIES},
)
_LLAMA_META = Layout(
    describes="Llama as Meta names it",
    tensors={f"w{part}.weight": _linear(f"w_{part}") for part in "qkvo"},
    equal_axes=_ONE_SIZE,
    options={"causal": True, "rotary": {"interleaved": True}},
    apart={"inner_attention.rope.freqs": _INVERSE_FREQUENCIES},
)
_T5 = Layout(
    describes="T5",
    tensors={f"{part}.weight": _linear(f"w_{part}") for part in "qkvo"},
    equal_axes={**_ONE_HEAD_COUNT, **_ONE_SIZE},
    options={"scale": 1.0},
    apart={"relative_attention_bias.weight": "the table of the relative positions, from which bias= is made"},
)
_VIT_TIMM = Layout(
    describes="ViT of timm",
    tensors={
        "qkv.weight": _linear("w_q", "w_k", "w_v"),
        "qkv.bias": _linear("b_q", "b_k", "b_v"),
        "proj.weight": _linear("w_o"),
        "proj.bias": _linear("b_o"),
    },
    optional=(("qkv.bias",), ("proj.bias",)),
    equal_axes={**_SELF, **_ONE_HEAD_COUNT, **_ONE_SIZE},
    refused={
        **{
            f"{part}_norm.{kind}": f"qk_norm {_LAYER_NORM}, unless the model says norm_layer=RmsNorm: then take "
            "q_norm.weight and k_norm.weight out of the state and give them as q_norm and k_norm"
            for part in "qk"
            for kind in ("weight", "bias")
        },
        **{f"norm.{kind}": "scale_norm normalises the merged heads before proj" for kind in ("weight", "bias")},
        **{f"gate.{kind}": f"gated {_GATE}" for kind in ("weight", "bias")},
    },
)
_BART_TENSORS = {
    f"{part}.{kind}": _linear(f"{letter}_{end}")
    for part, end in {"k_proj": "k", "v_proj": "v", "q_proj": "q", "out_proj": "o"}.items()
    for kind, letter in {"weight": "w", "bias": "b"}.items()
}
_BART = Layout(
    describes="BART as Hugging Face names it",
    tensors=_BART_TENSORS,
    optional=(tuple(name for name in _BART_TENSORS if name.endswith("bias")),),
    equal_axes={**_ONE_HEAD_COUNT, **_ONE_SIZE},
)
_WHISPER = Layout(
    describes="Whisper as Hugging Face names it",
    tensors={name: axes for name, axes in _BART_TENSORS.items() if name != "k_proj.bias"},
    equal_axes={**_ONE_HEAD_COUNT, **_ONE_SIZE},
)
_WHISPER_OPENAI = Layout(
    describes="Whisper as OpenAI names it",
    tensors={
        "query.weight": _linear("w_q"),
        "query.bias": _linear("b_q"),
        "key.weight": _linear("w_k"),
        "value.weight": _linear("w_v"),
        "value.bias": _linear("b_v"),
        "out.weight": _linear("w_o"),
        "out.bias": _linear("b_o"),
    },
    equal_axes={**_ONE_HEAD_COUNT, **_ONE_SIZE},
)


def _alternating(fused: str, output: str) -> dict[str, dict[str, str]]:
    """Name the fused tensors of query, key and value, and those of the output projection."""
    return {
        f"{fused}.weight": _linear("w_q", "w_k", "w_v"),
        f"{fused}.bias": _linear("b_q", "b_k", "b_v"),
        f"{output}.weight": _linear("w_o"),
        f"{output}.bias": _linear("b_o"),
    }


_FUSED = ("query_key_value.weight", "query_key_value.bias")
_GPT_NEOX = Layout(
    describes="GPT-NeoX",
    tensors=_alternating("query_key_value", "dense"),
    optional=(("query_key_value.bias", "dense.bias"),),
    equal_axes={**_SELF, **_ONE_HEAD_COUNT, **_ONE_SIZE},
    options={"causal": True, "rotary": {}},
    apart={
        "bias": "the causal mask",
        "masked_bias": "the number that the causal mask writes",
        "rotary_emb.inv_freq": _INVERSE_FREQUENCIES,
    },
    by_kv_head=_FUSED,
)
_BLOOM = Layout(
    describes="BLOOM",
    tensors=_alternating("query_key_value", "dense"),
    equal_axes={**_SELF, **_ONE_HEAD_COUNT, **_ONE_SIZE},
    options={"causal": True},
    by_kv_head=_FUSED,
)
_FALCON = Layout(
    describes="Falcon",
    tensors=_alternating("query_key_value", "dense"),
    optional=(("query_key_value.bias", "dense.bias"),),
    equal_axes={**_SELF, **_ONE_SIZE},
    options={"causal": True},
    apart={"rotary_emb.inv_freq": _INVERSE_FREQUENCIES},
    by_kv_head=_FUSED,
)
_MEGATRON_NORM = "the norm of the block, which Transformer Engine fuses with the projection"
_MEGATRON = Layout(
    describes="Megatron Core",
    tensors={
        **_alternating("linear_qkv", "linear_proj"),
        "q_layernorm.weight": _linear("q_norm"),
        "k_layernorm.weight": _linear("k_norm"),
    },
    optional=(("linear_qkv.bias",), ("linear_proj.bias",), ("q_layernorm.weight", "k_layernorm.weight")),
    equal_axes={**_SELF, **_ONE_SIZE},
    refused={f"{part}_layernorm.bias": f"qk_layernorm {_LAYER_NORM}" for part in "qk"},
    apart={
        **{f"linear_qkv.layer_norm_{kind}": _MEGATRON_NORM for kind in ("weight", "bias")},
        **{
            f"{part}._extra_state": "the state of Transformer Engine's 8-bit types"
            for part in ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
        },
    },
    by_kv_head=("linear_qkv.weight", "linear_qkv.bias"),
)

LAYOUTS = MappingProxyType(
    {
        "torch": _TORCH,
        "torch_separate": _TORCH_SEPARATE,
        "keras": _KERAS,
        "keras_grouped": _KERAS_GROUPED,
        "flax_linen": _FLAX_LINEN,
        "flax_nnx": _FLAX_NNX,
        "equinox": _EQUINOX,
        "bert": _BERT,
        "gpt2": _GPT2,
        "llama": _LLAMA,
        "llama_meta": _LLAMA_META,
        "qwen3": _QWEN3,
        "gemma3": _GEMMA3,
        "olmo2": _OLMO2,
        "phi3": _PHI3,
        "t5": _T5,
        "vit_timm": _VIT_TIMM,
        "bart": _BART,
        "whisper": _WHISPER,
        "whisper_openai": _WHISPER_OPENAI,
        "gpt_neox": _GPT_NEOX,
        "bloom": _BLOOM,
        "falcon": _FALCON,
        "megatron": _MEGATRON,
    }
)
"""All layouts by name."""
