"""Loading weights with the configuration of their model: its defaults, what is ignored, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.comparisons import assert_equal
from support.numbers import numbers

import mha_spec
from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec.weights import LoadedLayer, layouts, load_weights
from mha_spec.weights.families import FAMILIES, read_config
from mha_spec_conformance.targets.conversion import same_bits, to_library
from mha_spec_numpy import MultiHeadAttention

if TYPE_CHECKING:
    from collections.abc import Callable

    Array = numpy.ndarray

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.25,
    "head_dim": 10,
    "hidden_size": 11,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "num_key_value_heads": 3,
    "rope_scaling": None,
    "rope_theta": 500.0,
    "vocab_size": 7,
}


def zeros(**shapes: tuple[int, ...]) -> dict[str, Array]:
    return {name.replace("__", "."): numpy.zeros(shape) for name, shape in shapes.items()}


STATE = zeros(q_proj__weight=(60, 11), k_proj__weight=(30, 11), v_proj__weight=(30, 11), o_proj__weight=(11, 60))
NORMS = zeros(q_norm__weight=(10,), k_norm__weight=(10,))


def loaded(state: dict[str, Array] = STATE, **changes: Any) -> LoadedLayer:
    arguments = {
        name: changes.pop(name) for name in ("layout", "layer", "seq_len", "prefix", "heads") if name in changes
    }
    return load_weights(state, config={**CONFIG, **changes}, **arguments)


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


UNTYPED: Any = load_weights
GEMMA3 = {"model_type": "gemma3_text", "rope_theta": None}
BASES_OF_GEMMA3 = {"rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 5.0}}}
BAD: dict[str, tuple[Callable[[], object], type[MhaSpecError], tuple[str, ...]]] = {
    "unknown model": (
        lambda: loaded(model_type="qwen33"),
        ArgumentValueError,
        ("model_type of llama, mistral", "received model_type='qwen33'. Is it 'qwen3'?"),
    ),
    "no model": (lambda: loaded(model_type=None), ArgumentValueError, ("received model_type=None",)),
    "latent attention": (
        lambda: loaded(model_type="deepseek_v3"),
        ArgumentValueError,
        ("kv_lora_rank", "mscale_all_dim"),
    ),
    "sinks": (lambda: loaded(model_type="gpt_oss"), ArgumentValueError, ("take `sinks` out of the state",)),
    "a size under its older name": (
        lambda: load_weights(STATE, config={"model_type": "gpt2", "n_embd": 770, "n_head": 12}),
        ArgumentValueError,
        ("`config['n_embd']` must be a multiple of num_attention_heads=12", "received n_embd=770"),
    ),
    "no heads under their older name": (
        lambda: load_weights(STATE, config={"model_type": "gpt2", "n_head": 0}),
        ArgumentValueError,
        ("`n_head` must be n_head>=1, received n_head=0",),
    ),
    "an odd size of a head": (
        lambda: loaded(head_dim=9),
        ArgumentValueError,
        ("`config` must have an even head_dim", "received head_dim=9"),
    ),
    "two bases": (
        lambda: loaded(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        ArgumentValueError,
        ("`config['rope_theta']` must equal rope_theta=10000.0", "received rope_theta=500.0"),
    ),
    "two bases in the older form": (
        lambda: loaded(rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ArgumentValueError,
        ("`config['rope_theta']` must equal rope_theta=10000.0", "received rope_theta=500.0"),
    ),
    "two bases of the layers with a window": (
        lambda: read_config({**CONFIG, **GEMMA3, **BASES_OF_GEMMA3, "rope_local_base_freq": 6.0}, 0, None),
        ArgumentValueError,
        ("`config['rope_local_base_freq']` must equal rope_theta=5.0", "received rope_local_base_freq=6.0"),
    ),
    "two shares": (
        lambda: read_config(
            {"model_type": "gpt_neox", "rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}, 0, None
        ),
        ArgumentValueError,
        ("`config['rotary_pct']` must equal partial_rotary_factor=0.5", "received rotary_pct=0.25"),
    ),
    "a base that is an array": (
        lambda: loaded(rope_theta=None, rope_parameters={"rope_theta": numpy.ones(2)}),
        ArgumentTypeError,
        ("`rope_theta`, the base, must be a number",),
    ),
    "a rate of 2": (
        lambda: loaded(attention_dropout=2),
        ArgumentValueError,
        ("`config['attention_dropout']` must be 0<=attention_dropout<1", "received attention_dropout=2"),
    ),
    "heads as an array": (
        lambda: loaded(heads=numpy.array([4, 4])),
        ArgumentTypeError,
        ("`heads` must be an integer", "ndarray"),
    ),
    "a model without a name": (
        lambda: loaded(model_type=["llama"]),
        ArgumentValueError,
        ("received model_type=['llama']",),
    ),
    "more layers than a model has": (
        lambda: loaded(num_hidden_layers=10**12),
        ArgumentValueError,
        ("`config['num_hidden_layers']` must be num_hidden_layers<=1048576",),
    ),
    "a scalar beyond float64": (
        lambda: loaded(model_type="gemma2", query_pre_attn_scalar=10**400, layer=0),
        ArgumentValueError,
        ("`config['query_pre_attn_scalar']` must be finite",),
    ),
    "a size that no array has": (
        lambda: loaded(head_dim=2**70),
        ArgumentValueError,
        ("`config['head_dim']` must be head_dim<=1048576",),
    ),
    "no flag": (
        lambda: loaded(model_type="falcon", alibi=[1]),
        ArgumentTypeError,
        ("`alibi` must be True or False", "[1]"),
    ),
    "no number": (
        lambda: loaded(STATE | NORMS, model_type="qwen3", rms_norm_eps=float("nan")),
        ArgumentValueError,
        ("`config['rms_norm_eps']` must be finite", "nan"),
    ),
    "no dictionary": (
        lambda: load_weights(STATE, config=3),
        ArgumentTypeError,
        ("`config` must be a dictionary", "int"),
    ),
    "no file": (lambda: load_weights(STATE, config="nowhere.json"), ArgumentValueError, ("config='nowhere.json'",)),
    "other heads": (
        lambda: loaded(heads=3),
        ArgumentValueError,
        ("`heads` must be that of config, 6, received heads=3",),
    ),
    "another size of a head": (
        lambda: loaded(head_dim=12),
        ArgumentValueError,
        ("`q_proj.weight` must have shape=(heads*qk_dim, embed)=(72, 11), received shape=(60, 11)",),
    ),
    "another number of kv heads": (lambda: loaded(num_key_value_heads=2), ArgumentValueError, ("(20, ", "(30, 11)")),
    "another embedding": (lambda: loaded(hidden_size=12), ArgumentValueError, ("(60, 12)", "(60, 11)")),
    "heads that do not divide": (
        lambda: loaded(head_dim=None),
        ArgumentValueError,
        ("`config['hidden_size']` must be a multiple of num_attention_heads=6", "received hidden_size=11"),
    ),
    "norms of another model": (
        lambda: loaded(STATE | NORMS),
        ArgumentValueError,
        ("These names are of layout 'qwen3' or 'gemma3'", "unknown: q_norm.weight"),
    ),
    "heads as text": (
        lambda: loaded(num_attention_heads="6"),
        ArgumentTypeError,
        ("`num_attention_heads` must be an integer", "'6'"),
    ),
    "no heads": (lambda: loaded(num_attention_heads=0), ArgumentValueError, ("num_attention_heads>=1",)),
    "a window of 0": (
        lambda: loaded(model_type="mistral", sliding_window=0),
        ArgumentValueError,
        ("sliding_window>=1", "sliding_window=0"),
    ),
    "a flag as text": (
        lambda: loaded(attention_bias="no"),
        ArgumentTypeError,
        ("`attention_bias` must be True or False", "'no'"),
    ),
    "an unknown scaling": (
        lambda: loaded(rope_scaling={"rope_type": "ntk"}),
        ArgumentValueError,
        ("`rope_type` must be one of default", "'ntk'"),
    ),
    "both forms": (
        lambda: loaded(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}),
        ArgumentValueError,
        ("`config['rope_scaling']` must be null where rope_parameters are given",),
    ),
    "a part of the head": (
        lambda: loaded(partial_rotary_factor=0.5),
        ArgumentValueError,
        ("partial_rotary_factor=0.5", "whole heads"),
    ),
    "a flat dictionary for Gemma 3": (
        lambda: loaded(STATE | NORMS, **GEMMA3, rope_parameters={"rope_type": "default"}, layer=0),
        ArgumentValueError,
        ("`config['rope_parameters']` must hold a dictionary for full_attention and for sliding_attention",),
    ),
    "both directions": (
        lambda: loaded(model_type="gemma2", use_bidirectional_attention=True, layer=0),
        ArgumentValueError,
        ("use_bidirectional_attention=True, which cannot be loaded", "later tokens"),
    ),
    "linear biases of Falcon": (
        lambda: loaded(model_type="falcon", alibi=True),
        ArgumentValueError,
        ("alibi=True, which cannot be loaded", "bfloat16"),
    ),
    "chunks": (
        lambda: loaded(model_type="gemma2", layer_types=["chunked_attention"] * 5),
        ArgumentValueError,
        ("layer_types", "'chunked_attention'"),
    ),
    "too few kinds": (
        lambda: loaded(model_type="gemma2", layer_types=["full_attention"]),
        ArgumentValueError,
        ("`config['layer_types']` must be a list with a kind for each of num_hidden_layers=5",),
    ),
    "a softcap of 0": (
        lambda: loaded(model_type="gemma2", attn_logit_softcapping=0.0, layer=0),
        ArgumentValueError,
        ("attn_logit_softcapping>0",),
    ),
    "two names of a size": (
        lambda: loaded(model_type="gpt2", n_head=3),
        ArgumentValueError,
        ("`config['num_attention_heads']` must equal n_head=3",),
    ),
    "no biases": (
        lambda: loaded(attention_bias=True),
        ArgumentValueError,
        ("`state` must hold the biases that config says, b_q, b_k, b_v, b_o, received none",),
    ),
    "biases that no config says": (
        lambda: loaded(STATE | zeros(q_proj__bias=(60,), k_proj__bias=(30,), v_proj__bias=(30,))),
        ArgumentValueError,
        ("`state` must hold the biases that config says, none, received b_q, b_k, b_v",),
    ),
    "the norms of another layout": (
        lambda: loaded(STATE | NORMS, model_type="gemma3_text", layout="qwen3", layer=0),
        ArgumentValueError,
        ("`layout` must store the gains of norms as gemma3 does", "layout='qwen3'"),
    ),
    "a layer without a config": (
        lambda: UNTYPED(STATE, "llama", heads=6, layer=1),
        ArgumentValueError,
        ("`layer` must be None without a config, received layer=1",),
    ),
    "neither a layout nor a config": (lambda: UNTYPED(STATE), ArgumentTypeError, ("`layout`", "NoneType")),
    "a negative layer": (lambda: loaded(layer=-1), ArgumentValueError, ("layer>=0",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_errors_that_say_what_is_expected(case: str) -> None:
    call, error, parts = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("content", ["[1]", "{", "", "\xff", "[" * 100_000])
def test_a_file_that_is_not_a_dictionary_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ArgumentValueError, match=r"`config` must .*config\.json"):
        load_weights(STATE, config=path)


def test_an_object_of_transformers_is_to_be_a_dictionary() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ArgumentTypeError, match=r"received LlamaConfig\. Pass its to_dict\(\)"):
        load_weights(STATE, config=transformers.LlamaConfig())
