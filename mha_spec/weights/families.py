"""The models whose configurations `load_weights` reads: their layouts, their defaults, and what each key means."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mha_spec.array_checks import is_mapping
from mha_spec.errors import ArgumentValueError
from mha_spec.rotary_scaling import LARGEST_DIM, rotary_frequencies
from mha_spec.scalars import are_equal_numbers, short_repr

from .configs import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["BIASES", "FAMILIES", "AttentionConfig", "read_config"]

FULL, SLIDING = "full_attention", "sliding_attention"

BIASES = ("b_q", "b_k", "b_v", "b_o")

MOST_LAYERS = 2**20
"""The largest number of layers for which a list of their kinds is made."""


@dataclass(frozen=True)
class AttentionConfig:
    """What the configuration of a model says about the attention of a layer."""

    layout: str
    sizes: dict[str, int]
    """embed, heads, kv_heads and qk_dim."""
    options: dict[str, Any]
    """The options of multi_head_attention."""
    dropout_rate: float
    """The rate in training."""
    alibi: bool
    """True if the scores have linear biases."""
    biases: tuple[str, ...]
    """The names of the biases that the weights must have."""
    ignored: tuple[str, ...]
    """The keys with a value that were not read."""


@dataclass(frozen=True)
class Family:
    """A type of model: the keys of its configuration that concern attention, and their defaults in transformers."""

    layout: str
    defaults: Mapping[str, Any]
    other_names: Mapping[str, str] = field(default_factory=dict[str, str])
    """The name in the configuration of a key that other models name as here."""
    kv_heads: Callable[[Config, int], int] | None = None
    """Return the number of kv heads; None reads num_key_value_heads, by default the number of heads."""
    turns: bool = True
    """True if queries and keys are rotated."""
    base: str | Mapping[str, str] = "rope_theta"
    """The key that holds the base where no dictionary does, or that of each kind of layer."""
    scaling: Callable[[Config, Any, str], Any] | None = None
    """Return the dictionary of the rotation in a kind of layer from that of the configuration; None leaves it."""
    original_length: str | None = None
    """The key outside of the dictionary that holds the length before the scaling."""
    share: str | None = None
    """The key that holds the share of the head that turns; None if the whole head turns."""
    types: Callable[[Config, int], list[str]] | None = None
    """The kind of each layer where the configuration does not list them."""
    scale: Callable[[Config, int, int], float | None] | None = None
    """Return the factor of the scores from the size of a head and the index of the layer; None is the default."""
    softcap: bool = False
    epsilon: bool = False
    """True if queries and keys are normalised."""
    dropout: str = "attention_dropout"
    alibi: bool = False
    biases: str | tuple[str, ...] = "attention_bias"
    """The biases of every such model, or the key that says whether it has all four."""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    """Keys that ask for a computation that the layer lacks, with the reason."""
    scaled_by_layer: str | None = None
    """The key with which the scale depends on the layer."""


_BIDIRECTIONAL = {"use_bidirectional_attention": "queries also see later tokens, and the window has other bounds"}


def _every_layer(config: Config, layers: int) -> list[str]:
    return [FULL if config.get("sliding_window") is None else SLIDING] * layers


def _last_layers(config: Config, layers: int) -> list[str]:
    """Qwen: the layers from max_window_layers on have a window, if the configuration asks for windows."""
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        return [FULL] * layers
    first = config.integer("max_window_layers", least=0)
    return [FULL if layer < first else SLIDING for layer in range(layers)]


def _all_but_every(config: Config, layers: int) -> list[str]:
    """Gemma 3: every sixth layer has no window."""
    period = config.integer("sliding_window_pattern")
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def _alternating(_: Config, layers: int) -> list[str]:
    """Gemma 2: every second layer has no window."""
    return [FULL if layer % 2 else SLIDING for layer in range(layers)]


def _scalar(config: Config, qk_dim: int, _: int) -> float:
    return (config.positive("query_pre_attn_scalar") or qk_dim) ** -0.5


def _gpt2_scale(config: Config, qk_dim: int, layer: int) -> float | None:
    plain = config.flag("scale_attn_weights")
    if config.flag("scale_attn_by_inverse_layer_idx"):
        return (qk_dim**-0.5 if plain else 1.0) / (layer + 1)
    return None if plain else 1.0


def _grouped(config: Config, heads: int) -> int:
    return config.optional_integer("num_key_value_heads") or heads


def _every_head(_: Config, heads: int) -> int:
    return heads


def _falcon_kv_heads(config: Config, heads: int) -> int:
    multi_query, grouped = config.flag("multi_query"), config.flag("new_decoder_architecture")
    kv_heads = config.optional_integer("num_kv_heads")
    return (kv_heads or heads) if grouped else 1 if multi_query else heads


def _gemma3_scaling(config: Config, scaling: Any, kind: str) -> Any:
    """Gemma 3: each kind of layer has a dictionary of its own, or layers with a window are not scaled."""
    for key in _GEMMA3_BASES.values():
        config.get(key)  # Both are read: a layer of the other kind has the other.
    if not config.has("rope_parameters"):
        return scaling if kind == FULL else None
    if not is_mapping(scaling) or scaling.keys().isdisjoint((FULL, SLIDING)):
        config.refuse("rope_parameters", f"hold a dictionary for {FULL} and for {SLIDING}")
    return scaling.get(kind)


def _phi3_scaling(_config: Config, scaling: Any, _kind: str) -> Any:
    """Phi-3: the first configurations name longrope "yarn"."""
    if not is_mapping(scaling):
        return scaling
    return {
        key: "longrope" if key in ("type", "rope_type") and name == "yarn" else name for key, name in scaling.items()
    }


_GEMMA3_BASES = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
_LLAMA = Family(
    "llama", {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "max_position_embeddings": 2048}
)
_MISTRAL = replace(
    _LLAMA,
    defaults={
        **_LLAMA.defaults,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    types=_every_layer,
    biases=(),
)
_QWEN2 = replace(
    _LLAMA,
    defaults={
        **_LLAMA.defaults,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
    types=_last_layers,
    biases=BIASES[:3],
)
_QWEN3 = replace(
    _QWEN2,
    layout="qwen3",
    defaults={**_QWEN2.defaults, "head_dim": 128, "rms_norm_eps": 1e-6},
    epsilon=True,
    biases="attention_bias",
)
_GEMMA = replace(
    _LLAMA,
    defaults={
        "hidden_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 28,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    refused=_BIDIRECTIONAL,
)
_GEMMA2 = replace(
    _GEMMA,
    defaults={
        "hidden_size": 2304,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 26,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
    },
    types=_alternating,
    scale=_scalar,
    softcap=True,
)
_GEMMA3 = replace(
    _GEMMA2,
    layout="gemma3",
    defaults={
        **_GEMMA2.defaults,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rms_norm_eps": 1e-6,
    },
    types=_all_but_every,
    softcap=False,
    epsilon=True,
    base=_GEMMA3_BASES,
    scaling=_gemma3_scaling,
)
_OLMO2 = replace(
    _LLAMA,
    layout="olmo2",
    defaults={**_LLAMA.defaults, "rms_norm_eps": 1e-5},
    epsilon=True,
)
_PHI3 = replace(
    _LLAMA,
    layout="phi3",
    defaults={
        "hidden_size": 3072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    share="partial_rotary_factor",
    types=_every_layer,
    biases=(),
    scaling=_phi3_scaling,
    original_length="original_max_position_embeddings",
)
_GPT_NEOX = Family(
    "gpt_neox",
    {
        "hidden_size": 6144,
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "attention_bias": True,
    },
    kv_heads=_every_head,
    base="rotary_emb_base",
    share="rotary_pct",
)
_FALCON = Family(
    "falcon",
    {
        "hidden_size": 4544,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "multi_query": True,
    },
    other_names={"hidden_size": "n_embed", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    kv_heads=_falcon_kv_heads,
    biases="bias",
    refused={"alibi": "Falcon rounds the biases of its heads to bfloat16 and scales them"},
)
_BLOOM = Family(
    "bloom",
    {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2},
    other_names={"hidden_size": "n_embed", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    kv_heads=_every_head,
    turns=False,
    alibi=True,
    biases=BIASES,
)
_GPT2 = Family(
    "gpt2",
    {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "scale_attn_weights": True,
        "attn_pdrop": 0.1,
    },
    other_names={"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    kv_heads=_every_head,
    turns=False,
    scale=_gpt2_scale,
    dropout="attn_pdrop",
    biases=BIASES,
    scaled_by_layer="scale_attn_by_inverse_layer_idx",
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _MISTRAL,
        "qwen2": _QWEN2,
        "qwen3": _QWEN3,
        "gemma": _GEMMA,
        "gemma2": _GEMMA2,
        "gemma3_text": _GEMMA3,
        "olmo2": _OLMO2,
        "phi3": _PHI3,
        "gpt_neox": _GPT_NEOX,
        "falcon": _FALCON,
        "bloom": _BLOOM,
        "gpt2": _GPT2,
    }
)
"""The families by the model_type of their configurations."""

REFUSED = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3"),
        "keys and values are projected from a latent vector (kv_lora_rank), and the scale is multiplied by a factor "
        "that follows from mscale_all_dim",
    ),
    **dict.fromkeys(("cohere", "cohere2"), "its norms subtract the mean"),
    "gpt_oss": "sinks belong to the weights; take `sinks` out of the state, load the others with the layout llama, and "
    "pass sinks=",
    "llama4_text": "queries are scaled by their position, and layers attend within chunks",
}
"""Types of models that the layer cannot compute, with the reason."""


def read_config(keys: Mapping[str, Any], layer: int | None, seq_len: int | None) -> AttentionConfig:
    """Read what a configuration says about the attention of a layer.

    Raises:
        ArgumentValueError: The type of the model is unknown, a key has a wrong value or asks for a computation that the
            layer lacks, or `layer` is required.
    """
    name, family, inner = _family_of(keys)
    config = Config(inner, family.defaults, family.other_names)
    config.get("model_type")
    for key, reason in family.refused.items():
        config.refuse_use(key, f"in {name}, {reason}")
    embed, heads = (config.integer(key, most=LARGEST_DIM) for key in ("hidden_size", "num_attention_heads"))
    qk_dim = config.optional_integer("head_dim", most=LARGEST_DIM) or _share(config, embed, heads)
    read_kv_heads = _grouped if family.kv_heads is None else family.kv_heads
    kv_heads = read_kv_heads(config, heads)
    kind, position = _kind_of_layer(config, family, layer)
    options: dict[str, Any] = {"causal": True}
    if family.turns:
        options["rotary"] = _rotary(config, family, qk_dim, kind, seq_len)
    if kind == SLIDING:
        options["window"] = (config.integer("sliding_window") - 1, None)
    optional = {
        "scale": None if family.scale is None else family.scale(config, qk_dim, position),
        "softcap": config.positive("attn_logit_softcapping") if family.softcap else None,
        "norm_epsilon": config.number("rms_norm_eps") if family.epsilon else None,
    }
    return AttentionConfig(
        family.layout,
        {"embed": embed, "heads": heads, "kv_heads": kv_heads, "qk_dim": qk_dim},
        options | {option: value for option, value in optional.items() if value is not None},
        config.rate(family.dropout),
        family.alibi,
        _biases(config, family),
        _ignored(keys, inner, config.unread),
    )


def _biases(config: Config, family: Family) -> tuple[str, ...]:
    if isinstance(family.biases, tuple):
        return family.biases
    return BIASES if config.flag(family.biases) else ()


def _ignored(keys: Mapping[str, Any], inner: Mapping[str, Any], unread: list[str]) -> tuple[str, ...]:
    """Return the keys that were not read; those of the text model within a model of images have its name in front."""
    if inner is keys:
        return tuple(unread)
    outside = (key for key, value in keys.items() if value is not None and key not in ("text_config", "model_type"))
    return (*outside, *(f"text_config.{key}" for key in unread))


def _family_of(keys: Mapping[str, Any]) -> tuple[str, Family, Mapping[str, Any]]:
    """Return the type of the model, its family, and its keys, which a model of images and text has in `text_config`."""
    inner = keys.get("text_config")
    inner = inner if is_mapping(inner) and str(keys.get("model_type")) not in FAMILIES else keys
    name: Any = inner.get("model_type")
    if str(name) not in FAMILIES:
        reason = f" {name} cannot be loaded: {REFUSED[str(name)]}." if str(name) in REFUSED else ""
        near = get_close_matches(str(name), FAMILIES, 1, 0.8)
        hint = f" Is it {near[0]!r}?" if near and not reason else ""
        raise ArgumentValueError(
            f"`config` must have a model_type of {', '.join(FAMILIES)}, received model_type={short_repr(name)}.{reason}"
            f"{hint} Without config=, load_weights takes the name of a layout, and the call takes its options."
        )
    return str(name), FAMILIES[str(name)], inner


def _share(config: Config, embed: int, heads: int) -> int:
    if embed % heads:
        config.refuse("hidden_size", f"be a multiple of num_attention_heads={heads} where head_dim is absent")
    return embed // heads


def _is_scaled(config: Config, family: Family) -> bool:
    return family.scaled_by_layer is not None and config.flag(family.scaled_by_layer)


def _kind_of_layer(config: Config, family: Family, layer: int | None) -> tuple[str, int]:
    """Return the kind of the layer and its index, which may be unknown, 0, where all layers are the same."""
    layers = config.integer("num_hidden_layers", most=MOST_LAYERS)
    kinds = None if family.types is None else config.layer_types(layers) or family.types(config, layers)
    kinds = [FULL] * layers if kinds is None else kinds
    if layer is None and (len({*kinds[:layers]}) > 1 or _is_scaled(config, family)):
        raise ArgumentValueError(
            "`layer` must be given, the index of the layer, because the layers of this config differ; "
            "it is also read from a prefix with a single number, such as 'model.layers.3.self_attn'."
        )
    position = 0 if layer is None else config.index("num_hidden_layers", layer, layers)
    if kinds[position] not in (FULL, SLIDING):
        config.refuse("layer_types", f"hold {FULL} and {SLIDING} alone, and not {kinds[position]!r}")
    return kinds[position], position


def _rotary(config: Config, family: Family, qk_dim: int, kind: str, seq_len: int | None) -> dict[str, Any]:
    """Return the options of the rotation, from either form of the configuration."""
    scaling = _scaling(config)
    if family.scaling is not None:
        scaling = family.scaling(config, scaling, kind)
    key_of_base = family.base if isinstance(family.base, str) else family.base[kind]
    base = config.value_of_rotation(key_of_base, scaling, "rope_theta")
    share = config.value_of_rotation(family.share or "partial_rotary_factor", scaling, "partial_rotary_factor")
    if family.share is None and share is not None and not are_equal_numbers(share, 1):
        raise ArgumentValueError(
            f"`config` has partial_rotary_factor={short_repr(share)}, but this model turns whole heads."
        )
    if qk_dim % 2 and (share is None or are_equal_numbers(share, 1)):
        raise ArgumentValueError(
            "`config` must have an even head_dim, by default hidden_size / num_attention_heads, because components "
            f"turn in pairs, received head_dim={qk_dim}."
        )
    original = None if family.original_length is None else config.optional_integer(family.original_length)
    frequencies, factor = rotary_frequencies(
        scaling,
        qk_dim,
        base,
        max_position_embeddings=config.optional_integer("max_position_embeddings"),
        original_max_position_embeddings=original,
        partial_rotary_factor=share,
        seq_len=seq_len,
    )
    numbers = tuple(frequencies.tolist())
    return {"rotary_dim": 2 * len(numbers), "frequencies": numbers, "attention_factor": factor}


def _scaling(config: Config) -> Any:
    """Return the dictionary of the rotation, whose name depends on the version of transformers."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if scaling is not None and parameters is not None and repr(scaling) != repr(parameters):
        config.refuse("rope_scaling", "be null where rope_parameters are given")
    return parameters if scaling is None else scaling
