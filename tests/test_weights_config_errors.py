"""Configurations that do not fit the weights, or that are not valid, are errors that say what is expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.weight_configs import CONFIG, NORMS, STATE, loaded, zeros

from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec.weights import load_weights
from mha_spec.weights.families import read_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
