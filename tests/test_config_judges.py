"""Models of transformers whose attention is our layer, loaded by their config: the logits are those of "eager".

Two float64 evaluations of a function agree far better than a float32 evaluation agrees with either. The error of our
float32 evaluation is therefore the tolerance.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import pytest
import torch
import transformers
from support.comparisons import assert_same, largest_difference
from support.libraries import converted, with_float64
from support.transformers_world import in_dtype_of, randomized

import mha_spec
from mha_spec.weights import LoadedLayer, load_weights
from mha_spec_conformance.targets.conversion import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

BATCH, LENGTH, SYMBOLS = 2, 13, 67
PIECES = (0, 6, 12, LENGTH)
"""The ends of the pieces in which a sequence is decoded: two chunks, which JAX compiles once, then a single token."""

DECODER: dict[str, Any] = {
    "vocab_size": SYMBOLS,
    "hidden_size": 42,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""The sizes of a model whose heads do not fill the embedding."""

EVEN = {name: size for name, size in DECODER.items() if name != "head_dim"} | {"hidden_size": 84}
"""The sizes of a model that has no head_dim."""

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = [1.0, 1.25, 1.5, 2.0, 3.0, 4.5, 7.0]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": DECODER
    | {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8}, "attention_bias": True},
    "qwen3": DECODER
    | {"rope_theta": 1e6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "rms_norm_eps": 0.1},
    "gemma3_text": DECODER
    | {
        "num_hidden_layers": 3,
        "sliding_window_pattern": 3,
        "sliding_window": 4,
        "query_pre_attn_scalar": 29,
        "rope_theta": 700.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rms_norm_eps": 0.1,
    },
    "gpt_neox": {name: size for name, size in EVEN.items() if name != "num_key_value_heads"}
    | {"rotary_pct": 0.43, "rotary_emb_base": 70.0},
    "phi3": EVEN
    | {
        "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]},
        "original_max_position_embeddings": 32,
        "rope_theta": 90.0,
        "sliding_window": 4,
    },
    "falcon": EVEN | {"new_decoder_architecture": True, "num_kv_heads": 3, "bias": True, "rope_theta": 60.0},
    "falcon with a single kv head": EVEN | {"multi_query": True, "rope_theta": 60.0},
    "falcon without groups": EVEN | {"multi_query": False, "rope_theta": 60.0},
    "mistral": DECODER | {"sliding_window": 4},
    "qwen2": EVEN,
    "gemma": DECODER,
    "gemma2": DECODER | {"sliding_window": 4, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 29},
    "olmo2": EVEN | {"rms_norm_eps": 0.1},
    "bloom": {
        "vocab_size": SYMBOLS,
        "hidden_size": 42,
        "n_layer": 2,
        "n_head": 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2": {
        "vocab_size": SYMBOLS,
        "n_embd": 42,
        "n_layer": 2,
        "n_head": 3,
        "scale_attn_by_inverse_layer_idx": True,
        "attn_pdrop": 0.0,
    },
}
"""The configurations, in the form of published ones; a name begins with the model_type."""

OF_THE_ISSUE = ("llama", "qwen3", "gemma3_text", "gpt_neox", "phi3", "falcon")
PATHS = {"gpt_neox": "gpt_neox.layers.{}.attention", "gpt2": "transformer.h.{}.attn"}
PATHS |= dict.fromkeys(("falcon", "bloom"), "transformer.h.{}.self_attention")


def path(name: str, layer: int) -> str:
    return PATHS.get(name.split(maxsplit=1)[0], "model.layers.{}.self_attn").format(layer)


def config_of(name: str) -> dict[str, Any]:
    return {"model_type": name.split(maxsplit=1)[0], **deepcopy(CONFIGS[name])}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Use a single thread, which is fastest for such small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Judged(NamedTuple):
    """A model in float64, its logits by "eager", and input and output of the attention of each layer."""

    model: Any
    tokens: Tensor
    logits: Tensor
    attentions: list[tuple[Tensor, Tensor]]


@cache
def judged(name: str) -> Judged:
    torch.manual_seed(7)
    keys = config_of(name)
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys, attn_implementation="eager")
    model = randomized(transformers.AutoModelForCausalLM.from_config(config))
    tokens = torch.randint(3, SYMBOLS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))
    attentions: list[tuple[Tensor, Tensor]] = []

    def record(_: Any, arguments: Any, keywords: dict[str, Any], result: Any) -> None:
        hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        attentions.append((hidden, result[0]))

    hooks = [
        model.get_submodule(path(name, layer)).register_forward_hook(record, with_kwargs=True)
        for layer in range(model.config.num_hidden_layers)
    ]
    with torch.no_grad(), in_dtype_of(model):
        logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return Judged(model, tokens, logits, attentions)


class Ours(torch.nn.Module):
    """Our layer in the place of the attention of a model, with its own cache."""

    def __init__(self, loaded: LoadedLayer, cache: Any) -> None:
        super().__init__()
        self.loaded, self.cache = loaded, cache

    def forward(self, hidden_states: Tensor, *others: Any, **_: Any) -> tuple[Tensor, None]:
        x, layer, options = hidden_states, self.loaded, self.loaded.options
        if layer.alibi:
            options = options | {"bias": self.bias(x.shape[1]).to(x.dtype)}
        result: Any = mha_spec.multi_head_attention(x, x, x, layer.params, cache=self.cache, **options)
        output, self.cache = (result, None) if self.cache is None else result
        # The attention of BLOOM adds the residual, its second argument.
        return output + others[0] if layer.alibi else output, None

    def bias(self, length: int) -> Tensor:
        heads, cache = self.loaded.params["w_q"].shape[1], self.cache
        kv_len, offset = (length, 0) if cache is None else (cache.key.shape[2], cache.lengths)
        return mha_spec.backend("torch").alibi_bias(heads, length, kv_len, q_offset=offset)


def empty_cache(loaded: LoadedLayer, length: int = LENGTH) -> Any:
    _, kv_heads, qk_dim = loaded.params["w_k"].shape
    return mha_spec.KVCache.empty(BATCH, kv_heads, length, qk_dim, like=loaded.params["w_k"])


def with_our_layers(
    name: str, dtype: str, *, cached: bool, change: Callable[[LoadedLayer], LoadedLayer] = lambda loaded: loaded
) -> Any:
    """Replace the attention of every layer by ours, loaded from the weights by the config."""
    model = deepcopy(judged(name).model).to(getattr(torch, dtype))
    state = model.state_dict()
    for layer in range(model.config.num_hidden_layers):
        loaded = change(load_weights(state, config=config_of(name), prefix=path(name, layer)))
        model.set_submodule(path(name, layer), Ours(loaded, empty_cache(loaded) if cached else None))
    return model


def logits(name: str, dtype: str, ends: tuple[int, ...], **options: Any) -> Tensor:
    """Compute the logits piece by piece; a single piece has no cache."""
    model, tokens = with_our_layers(name, dtype, cached=len(ends) > 2, **options), judged(name).tokens
    pieces: list[Tensor] = []
    with torch.no_grad(), in_dtype_of(model):
        for start, stop in pairwise(ends):
            positions = {} if name == "bloom" else {"position_ids": torch.arange(start, stop)[None]}
            pieces.append(model(tokens[:, start:stop], use_cache=False, **positions).logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("ends", [(0, LENGTH), PIECES], ids=["prefill", "pieces"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_eager(name: str, ends: tuple[int, ...]) -> None:
    assert_same(lambda dtype: logits(name, dtype, ends), judged(name).logits)


class Attention(NamedTuple):
    """The attention of a layer of a model: its weights, its name, its input and its output."""

    state: dict[str, numpy.ndarray]
    prefix: str
    x: numpy.ndarray
    output: numpy.ndarray


@cache
def attentions_of(name: str) -> list[Attention]:
    """Return the attention of each layer whose options no earlier layer has."""
    model, _, _, attentions = judged(name)
    state = {key: to_numpy(array) for key, array in model.state_dict().items()}
    chosen: list[Attention] = []
    seen: list[dict[str, Any]] = []
    for layer, (x, output) in enumerate(attentions):
        prefix = path(name, layer)
        options = load_weights(state, config=config_of(name), prefix=prefix).options
        if options not in seen:
            held = {key: array for key, array in state.items() if key.startswith(f"{prefix}.")}
            chosen.append(Attention(held, prefix, to_numpy(x), to_numpy(output)))
        seen.append(options)
    return chosen


def attended(name: str, library: str, dtype: str, ends: tuple[int, ...]) -> list[numpy.ndarray]:
    """Compute the attention of the layers of a model in a library, piece by piece."""
    outputs: list[numpy.ndarray] = []
    for state, prefix, x, _ in attentions_of(name):
        loaded = load_weights(converted(state, library, dtype), config=config_of(name), prefix=prefix)
        cache, pieces = empty_cache(loaded), []
        for start, stop in pairwise(ends):
            part = converted(numpy.ascontiguousarray(x[:, start:stop]), library, dtype)
            output, cache = mha_spec.multi_head_attention(
                part, part, part, loaded.params, cache=cache, **loaded.options
            )
            pieces.append(to_numpy(output))
        outputs.append(numpy.concatenate(pieces, axis=1))
    return outputs


@cache
def in_numpy(name: str, dtype: str) -> list[numpy.ndarray]:
    return attended(name, "numpy", dtype, PIECES)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "tensorflow"])
@pytest.mark.parametrize("name", OF_THE_ISSUE)
def test_the_attention_is_that_of_eager_on_every_backend(name: str, library: str) -> None:
    """The error of NumPy's float32 evaluation is the tolerance of every library."""
    pytest.importorskip(library)
    with with_float64(library):
        results = attended(name, library, "float64", PIECES)
    for result, attention, wide, narrow in zip(
        results, attentions_of(name), in_numpy(name, "float64"), in_numpy(name, "float32"), strict=True
    ):
        assert (result.dtype, result.shape) == (numpy.float64, attention.output.shape)
        assert largest_difference(result, attention.output) < largest_difference(wide, narrow.astype("float64"))


def without(option: str) -> Callable[[LoadedLayer], LoadedLayer]:
    return lambda loaded: replace(loaded, options={k: v for k, v in loaded.options.items() if k != option})


def with_rotary(**changes: Any) -> Callable[[LoadedLayer], LoadedLayer]:
    return lambda loaded: replace(loaded, options=loaded.options | {"rotary": loaded.options["rotary"] | changes})


def with_frequencies_of(base: float) -> Callable[[LoadedLayer], LoadedLayer]:
    def change(loaded: LoadedLayer) -> LoadedLayer:
        turned = loaded.options["rotary"]["rotary_dim"]
        return with_rotary(frequencies=tuple(base ** (-2 * i / turned) for i in range(turned // 2)))(loaded)

    return change


MISTAKES: dict[str, tuple[str, Callable[[LoadedLayer], LoadedLayer]]] = {
    "the rotation not scaled": ("llama", with_frequencies_of(500.0)),
    "pairs of neighbours": ("llama", with_rotary(interleaved=True)),
    "another epsilon": ("qwen3", without("norm_epsilon")),
    "no window": ("qwen3", without("window")),
    "the default scale": ("gemma3_text", without("scale")),
    "the same base in every layer": ("gemma3_text", with_frequencies_of(50.0)),
    "another base": ("gpt_neox", with_frequencies_of(10000.0)),
    "no attention factor": ("phi3", with_rotary(attention_factor=1.0)),
    "no rotation": ("falcon", without("rotary")),
    "no softcap": ("gemma2", without("softcap")),
    "the scale of the first layer": ("gpt2", without("scale")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_exceeds_the_tolerance(mistake: str) -> None:
    name, change = MISTAKES[mistake]
    wide, narrow = (logits(name, dtype, (0, LENGTH)) for dtype in ("float64", "float32"))
    wrong = logits(name, "float64", (0, LENGTH), change=change)
    assert largest_difference(wrong, judged(name).logits) > largest_difference(wide, narrow.double())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_newer_form_of_the_config_says_the_same(name: str) -> None:
    model = judged(name).model
    for layer in range(model.config.num_hidden_layers):
        older, newer = (
            load_weights(model.state_dict(), config=config, prefix=path(name, layer))
            for config in (config_of(name), model.config.to_dict())
        )
        assert newer.options == older.options
        assert newer.dropout_rate == older.dropout_rate
