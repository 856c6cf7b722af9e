"""Loading weights with the configuration of their model: its defaults, and what is ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from support.comparisons import assert_equal
from support.numbers import numbers
from support.weight_configs import CONFIG, NORMS, STATE, loaded, zeros

import mha_spec
from mha_spec import ArgumentValueError
from mha_spec.weights import layouts, load_weights
from mha_spec.weights.families import FAMILIES, read_config
from mha_spec_conformance.targets.conversion import same_bits, to_library
from mha_spec_numpy import MultiHeadAttention


def window_of(layer: int | None, **changes: Any) -> Any:
    return read_config({**CONFIG, **changes}, layer, None).options.get("window")


def test_the_config_sets_the_sizes_and_the_options() -> None:
    layer = loaded()
    frequencies, _ = mha_spec.rotary_frequencies(None, 10, 500.0)
    rotary = {"rotary_dim": 10, "frequencies": tuple(frequencies.tolist()), "attention_factor": 1.0}
    assert layer.options == {"causal": True, "rotary": rotary}
    assert layer.ignored == ("architectures", "vocab_size")
    assert (layer.dropout_rate, layer.alibi) == (0.25, False)
    assert layer.params["w_q"].shape == (11, 6, 10)


def test_the_weights_are_those_of_the_layout() -> None:
    state = {name: numbers(*array.shape) for name, array in STATE.items()}
    params, plain = loaded(state).params, load_weights(state, "llama", heads=6)
    assert params.keys() == plain.keys()
    assert all(same_bits(params[name], plain[name]) for name in plain)
    assert_equal(params["w_k"], state["k_proj.weight"].reshape(3, 10, 11).transpose(2, 0, 1))


def test_bloom_has_linear_biases() -> None:
    state = zeros(query_key_value__weight=(18, 6), query_key_value__bias=(18,), dense__weight=(6, 6), dense__bias=(6,))
    assert load_weights(state, config={"model_type": "bloom", "hidden_size": 6, "n_head": 3}).alibi


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    for config in (path, str(path)):
        assert load_weights(STATE, config=config).options == loaded().options


def test_the_object_holds_the_settings() -> None:
    state = {name: numbers(*array.shape) for name, array in (STATE | NORMS).items()}
    layer = loaded(
        state, model_type="qwen3", rms_norm_eps=0.25, use_sliding_window=True, sliding_window=2, max_window_layers=0
    )
    made = MultiHeadAttention(**layer.settings.arguments, dtype="float64")
    assert made.settings.dropout_rate == 0.25
    assert {name: array.shape for name, array in made.params.items()} == layer.settings.shapes()
    made.params = layer.params
    x = numbers(2, 5, 11)
    assert layer.call_options == {"causal": True, "window": (1, None)}
    expected = mha_spec.multi_head_attention(x, x, x, layer.params, **layer.options)
    assert numpy.array_equal(made(x, **layer.call_options), expected)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "tensorflow"])
def test_the_lines_of_the_page_load_the_object_of_each_framework(library: str) -> None:
    pytest.importorskip(library)
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```python")]
    lines = next(block for block in blocks if f"from mha_spec_{library} import" in block)
    state = {name: to_library(numbers(*array.shape).astype("float32"), library) for name, array in STATE.items()}
    layer, x = loaded(state), to_library(numbers(2, 5, 11).astype("float32"), library)
    names: dict[str, Any] = {"layer": layer, "x": x}
    exec(lines, names)
    assert_equal(names["attention"].params, layer.params)
    assert_equal(names["output"], names["attention"](x, **layer.call_options))  # Nothing is dropped at random.


def test_the_object_needs_all_biases_or_none() -> None:
    biases = zeros(q_proj__bias=(60,), k_proj__bias=(30,), v_proj__bias=(30,))
    layer = loaded(STATE | biases, model_type="qwen2")
    with pytest.raises(ArgumentValueError, match="received no b_o"):
        _ = layer.settings
    assert loaded(STATE | biases | zeros(o_proj__bias=(11,)), attention_bias=True).settings.bias


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(name).to_dict()
    for layer in (0, 1):
        ours, written = read_config({"model_type": name}, layer, None), read_config(theirs, layer, None)
        assert (ours.layout, ours.sizes, ours.options) == (written.layout, written.sizes, written.options)
        assert (ours.dropout_rate, ours.ignored) == (written.dropout_rate, ())


def test_every_layout_of_a_family_exists() -> None:
    assert {family.layout for family in FAMILIES.values()} <= set(layouts())


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 4}, [(3, None)] * 5),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 5),
        ({"model_type": "llama", "sliding_window": 4}, [None] * 5),
        ({"model_type": "qwen3", "sliding_window": 4}, [None] * 5),
        (
            {"model_type": "qwen3", "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, (3, None), (3, None)],
        ),
        ({"model_type": "gemma2", "sliding_window": 4}, [(3, None), None, (3, None), None, (3, None)]),
        ({"model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2}, [(3, None), None] * 2),
        (
            {
                "model_type": "gemma3_text",
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention"] * 3,
            },
            [None, (3, None)] * 2,
        ),
    ],
)
def test_the_window_is_that_of_the_layer(changes: dict[str, Any], windows: list[Any]) -> None:
    for layer, window in enumerate(windows):
        assert window_of(layer, **changes) == window
    if len({*windows}) == 1:
        assert window_of(None, **changes) == windows[0]
    else:
        with pytest.raises(ArgumentValueError, match="`layer` must be given"):
            window_of(None, **changes)


def test_the_layer_is_read_from_the_prefix() -> None:
    def window(prefix: str, **options: Any) -> Any:
        state = {f"{prefix}.{name}": array for name, array in STATE.items()}
        return loaded(state, model_type="gemma2", sliding_window=4, prefix=prefix, **options).options.get("window")

    assert window("model.layers.2.self_attn") == window("attn", layer=2) == window("experts.1.layers.0", layer=2)
    assert window("model.layers.3.self_attn") is None
    assert window("layer2", layer=3) is None
    assert window("layers.2", layer=3) is None
    assert window("layers.7", layer=2) == window("layers.2")
    with pytest.raises(ArgumentValueError, match="0<=layer<num_hidden_layers=5, received layer=5"):
        window("layers.5")


def test_the_bases_of_gemma_3() -> None:
    def rotary(layer: int, **changes: Any) -> Any:
        keys = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
        keys |= {"model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_scaling": None}
        return read_config({**keys, **changes}, layer, None).options["rotary"]["frequencies"]

    def frequencies(base: float, scaling: Any = None) -> tuple[float, ...]:
        return tuple(mha_spec.rotary_frequencies(scaling, 10, base)[0].tolist())

    linear = {"rope_type": "linear", "factor": 8.0}
    assert (rotary(0), rotary(1)) == (frequencies(1e4), frequencies(1e6))
    older = {"rope_scaling": linear, "rope_theta": 7.0, "rope_local_base_freq": 5.0}
    newer = {
        "rope_parameters": {
            "full_attention": linear | {"rope_theta": 7.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
        }
    }
    for form in (older, newer):
        assert (rotary(0, **form), rotary(1, **form)) == (frequencies(5.0), frequencies(7.0, linear))


def test_both_forms_may_name_the_same_base() -> None:
    for base in (500, numpy.float64(500.0)):
        assert loaded(rope_theta=base, rope_parameters={"rope_theta": 500.0}).options == loaded().options


def test_longrope_depends_on_the_number_of_tokens() -> None:
    short, long = [1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]
    scaling = {"type": "yarn", "short_factor": short, "long_factor": long}
    keys = {**CONFIG, "model_type": "phi3", "rope_scaling": scaling, "original_max_position_embeddings": 16}
    for seq_len, factor in ((None, 1.0), (16, 1.0), (17, 6.0)):
        first = read_config(keys, None, seq_len).options["rotary"]["frequencies"][0]
        assert first == float(numpy.float32(1) / numpy.float32(factor))


def test_names_of_meta_turn_neighbours() -> None:
    state = {f"w{name[0]}.weight": array for name, array in STATE.items()}
    layer = loaded(state, layout="llama_meta")
    assert layer.options["rotary"]["interleaved"] is True
    assert layer.options["rotary"]["frequencies"] == loaded().options["rotary"]["frequencies"]


def test_the_text_of_a_model_with_images() -> None:
    inner = {name: value for name, value in CONFIG.items() if name not in ("architectures", "rope_theta")}
    keys = {"model_type": "gemma3", "text_config": {**inner, "model_type": "gemma3_text"}, "mm_tokens_per_image": 256}
    layer = load_weights(STATE | NORMS, config=keys, layer=0)
    assert layer.ignored == ("mm_tokens_per_image", "text_config.vocab_size")
    assert layer.options["window"] == (4095, None)


def test_the_scale_of_gpt2() -> None:
    def scale(layer: int | None = None, **keys: Any) -> Any:
        return read_config({"model_type": "gpt2", "n_embd": 12, "n_head": 3, **keys}, layer, None).options.get("scale")

    assert scale() is None
    assert scale(scale_attn_weights=False) == 1.0
    assert scale(3, scale_attn_by_inverse_layer_idx=True) == 1 / 8
    assert scale(3, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False) == 1 / 4
    with pytest.raises(ArgumentValueError, match="`layer` must be given"):
        scale(scale_attn_by_inverse_layer_idx=True)


@pytest.mark.parametrize(
    ("keys", "kv_heads"),
    [
        ({}, 1),
        ({"multi_query": False}, 6),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
        ({"new_decoder_architecture": True}, 6),
        ({"num_kv_heads": 2}, 1),
    ],
)
def test_the_kv_heads_of_falcon(keys: dict[str, Any], kv_heads: int) -> None:
    read = read_config({"model_type": "falcon", "hidden_size": 12, "n_head": 6, **keys}, None, None)
    assert read.sizes == {"embed": 12, "heads": 6, "kv_heads": kv_heads, "qk_dim": 2}
