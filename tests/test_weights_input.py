"""Loading and saving weights: the tables, bad input, arrays of every library, files."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
import pytest
from support.numbers import numbers

from mha_spec.arrays import dtype_name, library_of
from mha_spec.errors import ArgumentTypeError, ArgumentValueError, MhaSpecError
from mha_spec.parameters import AXES
from mha_spec.weights import (
    Layout,
    half_split_pairs,
    interleaved_pairs,
    layouts,
    load_weights,
    save_weights,
)
from mha_spec.weights.validation import check_layout
from mha_spec_conformance.targets.conversion import same_bits, to_library, to_numpy

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Array = numpy.ndarray

SIZES = {"embed": 11, "k_embed": 13, "v_embed": 17, "heads": 6, "kv_heads": 3, "qk_dim": 10, "v_dim": 7, "out": 19}


def params_of(layout: Layout, *, optional: bool = True, dtype: Any = numpy.float32) -> dict[str, Array]:
    """Make the params that the layout can hold, with as many different sizes as it allows."""
    absent = set() if optional else {name for group in layout.optional for name in group}
    held = {param for name, parts in layout.tensors.items() if name not in absent for param in parts}
    drawn = {
        param: numbers(*(SIZES[layout.equal_axes.get(axis, axis)] for axis in axes))
        for param, axes in AXES.items()
        if param in held
    }
    # Gains that are stored less 1 have few digits, so that 1 is added without a rounding.
    few = {param: (array * 32).round() / 32 if param in layout.one_less else array for param, array in drawn.items()}
    return {param: array.astype(dtype) for param, array in few.items()}


def zeros(**shapes: tuple[int, ...]) -> dict[str, Array]:
    return {name.replace("__", "."): numpy.zeros(shape) for name, shape in shapes.items()}


LLAMA = zeros(q_proj__weight=(60, 11), k_proj__weight=(30, 11), v_proj__weight=(30, 11), o_proj__weight=(11, 60))
TORCH = zeros(in_proj_weight=(45, 15), in_proj_bias=(45,), out_proj__weight=(15, 15), out_proj__bias=(15,))
NORMS = zeros(q_norm__weight=(10,), k_norm__weight=(10,))
PARAMS = load_weights(LLAMA, "llama", heads=6)


def under(prefix: str, state: dict[str, Array]) -> dict[str, Array]:
    return {f"{prefix}.{name}": array for name, array in state.items()}


def without(name: str, state: dict[str, Array]) -> dict[str, Array]:
    return {key: array for key, array in state.items() if key != name}


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("optional", [True, False])
def test_loading_gives_the_saved_params(name: str, *, optional: bool) -> None:
    params = params_of(layouts()[name], optional=optional)
    state = save_weights(params, name, prefix="a/b" if layouts()[name].separator == "/" else "a.b")
    loaded = load_weights(state, name, heads=6, prefix="a/b" if layouts()[name].separator == "/" else "a.b")
    assert list(loaded) == list(params)
    assert all(same_bits(loaded[param], params[param]) for param in params)


@pytest.mark.parametrize("layout", layouts().values(), ids=layouts())
def test_tables_are_coherent(layout: Layout) -> None:
    held = [param for parts in layout.tensors.values() for param in parts]
    assert len(held) == len(set(held))
    names = [name for group in layout.optional for name in group]
    assert set(names) <= set(layout.tensors)
    assert not (set(layout.refused) | set(layout.apart)) & set(layout.tensors)
    for parts in layout.tensors.values():
        split = {param: [axis.split("*") for axis in pattern.split()] for param, pattern in parts.items()}
        assert all(sorted(chain(*axes)) == sorted(AXES[param]) for param, axes in split.items())
        plain = {
            tuple(layout.equal_axes.get(a[0], a[0]) if len(a) == 1 else "" for a in axes) for axes in split.values()
        }
        assert len(plain) == 1


BAD: dict[str, tuple[Callable[[], object], type[MhaSpecError], tuple[str, ...]]] = {
    "unknown layout": (
        lambda: load_weights(LLAMA, "lama", heads=6),
        ArgumentValueError,
        ("layout='lama'", "torch_separate", "Did you mean 'llama'?"),
    ),
    "no layout": (lambda: save_weights(PARAMS, None), ArgumentTypeError, ("`layout`", "NoneType")),
    "no mapping": (lambda: load_weights(3, "llama"), ArgumentTypeError, ("`state` must be a mapping", "int")),
    "a list where there is no order": (lambda: load_weights([], "llama"), ArgumentTypeError, ("`state`", "list")),
    "no array": (
        lambda: load_weights(LLAMA | {"q_proj.weight": "x"}, "llama", heads=6),
        ArgumentTypeError,
        ("`state` must hold arrays", "q_proj.weight=str"),
    ),
    "params no mapping": (
        lambda: save_weights([1], "llama"),
        ArgumentTypeError,
        ("`params` must be a mapping", "list"),
    ),
    "prefix no string": (lambda: load_weights(LLAMA, "llama", prefix=0), ArgumentTypeError, ("`prefix`", "prefix=0")),
    "missing name": (
        lambda: load_weights(without("k_proj.weight", LLAMA), "llama", heads=6),
        ArgumentValueError,
        (
            "missing: k_proj.weight\n",
            "expected: q_proj.weight, k_proj.weight, v_proj",
            "received: o_proj.weight, q_proj",
        ),
    ),
    "misspelt name": (
        lambda: load_weights(without("k_proj.weight", LLAMA) | {"k_porj.weight": 0}, "llama", heads=6),
        ArgumentValueError,
        ("missing: k_proj.weight (is it k_porj.weight?)", "unknown: k_porj.weight (is it k_proj.weight?)"),
    ),
    "unknown name": (
        lambda: load_weights(LLAMA | {"sinks": 0}, "llama", heads=6),
        ArgumentValueError,
        ("unknown: sinks", "expected: q_proj.weight", "received: k_proj.weight"),
    ),
    "norms without a meaning": (
        lambda: load_weights(LLAMA | NORMS, "llama", heads=6),
        ArgumentValueError,
        ("These names are of layout 'qwen3' or 'gemma3' or 'olmo2'", "unknown: q_norm.weight"),
    ),
    "norms of all heads": (
        lambda: load_weights(LLAMA | zeros(q_norm__weight=(60,), k_norm__weight=(30,)), "qwen3", heads=6),
        ArgumentValueError,
        ("`q_norm.weight` must have shape=(qk_dim)=(10), received shape=(60,)",),
    ),
    "norms of a head": (
        lambda: load_weights(LLAMA | NORMS, "olmo2", heads=6),
        ArgumentValueError,
        ("`q_norm.weight` must have shape=(heads*qk_dim)=(60), received shape=(10,)",),
    ),
    "half of a group": (
        lambda: load_weights(LLAMA | without("q_norm.weight", NORMS), "qwen3", heads=6),
        ArgumentValueError,
        ("missing: q_norm.weight", "received: k_norm.weight"),
    ),
    "nothing under the prefix": (
        lambda: load_weights(under("layers.3.self_attn", LLAMA), "llama", heads=6, prefix="layers.30.self_attn"),
        ArgumentValueError,
        ("under 'layers.30.self_attn.'", "Such a layer is under 'layers.3.self_attn.'", "received: nothing"),
    ),
    "no prefix": (
        lambda: load_weights(under("a", LLAMA) | under("b", LLAMA), "llama", heads=6),
        ArgumentValueError,
        ("no others without a prefix", "Such a layer is under 'a.', 'b.'"),
    ),
    "another layout": (
        lambda: load_weights(LLAMA, "torch", heads=6),
        ArgumentValueError,
        ("These names are of layout 'llama'", "missing: in_proj_weight", "unknown: q_proj.weight"),
    ),
    "a bias that Whisper has not": (
        lambda: load_weights(save_weights(params_of(layouts()["bart"]), "bart"), "whisper", heads=6),
        ArgumentValueError,
        ("These names are of layout 'bart'", "unknown: k_proj.bias\n"),
    ),
    "groups that do not divide in a fused tensor": (
        lambda: load_weights(zeros(query_key_value__weight=(140, 11), dense__weight=(11, 60)), "falcon", heads=6),
        ArgumentValueError,
        ("heads=6 of `heads`", "kv_heads=4 of `query_key_value.weight`", "MHA-HEAD-2"),
    ),
    "bias_k": (
        lambda: load_weights(TORCH | zeros(bias_k=(1, 1, 15)), "torch", heads=3),
        ArgumentValueError,
        ("`bias_k` cannot be loaded", "add_bias_kv", "learned key"),
    ),
    "LayerNorm of flax": (
        lambda: load_weights({"query_ln": {"scale": 0}}, "flax_linen"),
        ArgumentValueError,
        ("`query_ln/scale` cannot be loaded", "LayerNorm"),
    ),
    "gate of Keras": (
        lambda: load_weights({"m/gate/kernel": 0}, "keras", prefix="m"),
        ArgumentValueError,
        ("`m/gate/kernel` cannot be loaded", "use_gate"),
    ),
    "a list too long": (
        lambda: load_weights([numpy.zeros(3)] * 10, "keras"),
        ArgumentValueError,
        ("the 8 or, without", "the 4 weights", "query/kernel, query/bias", "received 10 arrays"),
    ),
    "a list with a prefix": (
        lambda: load_weights([], "keras", prefix="m"),
        ArgumentValueError,
        ("`prefix` must be ''",),
    ),
    "no heads": (
        lambda: load_weights(LLAMA, "llama"),
        ArgumentValueError,
        ("`heads` must be given", "`q_proj.weight` has heads*qk_dim=60"),
    ),
    "heads no integer": (lambda: load_weights(LLAMA, "llama", heads=6.0), ArgumentTypeError, ("heads=6.0",)),
    "heads a boolean": (lambda: load_weights(LLAMA, "llama", heads=True), ArgumentTypeError, ("heads=True",)),
    "no head": (lambda: load_weights(LLAMA, "llama", heads=0), ArgumentValueError, (">=1", "heads=0")),
    "heads that do not divide": (
        lambda: load_weights(under("x", LLAMA), "llama", heads=7, prefix="x"),
        ArgumentValueError,
        ("`x.q_proj.weight` must have shape=(heads*qk_dim, embed)=(7*qk_dim, embed)", "received shape=(60, 11)"),
    ),
    "heads against the shapes": (
        lambda: load_weights(save_weights(PARAMS, "flax_nnx"), "flax_nnx", heads=3),
        ArgumentValueError,
        ("`query/kernel`", "=(11, 3, qk_dim)", "received shape=(11, 6, 10)"),
    ),
    "kv_heads against the shapes": (
        lambda: load_weights(LLAMA, "llama", heads=6, kv_heads=2),
        ArgumentValueError,
        ("`k_proj.weight`", "=(20, k_embed)", "received shape=(30, 11)", "kv_heads=2 of `kv_heads`"),
    ),
    "kv_heads where there are none": (
        lambda: load_weights(TORCH, "torch", heads=3, kv_heads=1),
        ArgumentValueError,
        ("`kv_heads` must be heads=3 in this layout, received kv_heads=1",),
    ),
    "groups that do not divide": (
        lambda: load_weights(LLAMA | zeros(k_proj__weight=(40, 11), v_proj__weight=(40, 11)), "llama", heads=6),
        ArgumentValueError,
        ("heads=6 of `heads`", "kv_heads=4 of `k_proj.weight`", "MHA-HEAD-2"),
    ),
    "wrong shape": (
        lambda: load_weights(TORCH | zeros(out_proj__weight=(15, 30)), "torch", heads=3),
        ArgumentValueError,
        ("`out_proj.weight`", "=(15, 15)", "received shape=(15, 30)", "qk_dim=5 of `in_proj_weight`"),
    ),
    "wrong rank": (
        lambda: load_weights(TORCH | zeros(in_proj_bias=(3, 15)), "torch", heads=3),
        ArgumentValueError,
        ("`in_proj_bias`", "=(45)", "received shape=(3, 15)"),
    ),
    "an empty axis": (
        lambda: load_weights(LLAMA | zeros(q_proj__weight=(60, 0)), "llama", heads=6),
        ArgumentValueError,
        ("`q_proj.weight`", "received shape=(60, 0)"),
    ),
    "groups saved where there are none": (
        lambda: save_weights(PARAMS, "torch"),
        ArgumentValueError,
        ("`w_k`", "=(11, 6, 10)", "received shape=(11, 3, 10)", "kv_heads=heads in this layout"),
    ),
    "v_dim saved where there is none": (
        lambda: save_weights(params_of(layouts()["equinox"]), "t5"),
        ArgumentValueError,
        ("unknown: b_q", "expected: w_q, w_k, w_v, w_o"),
    ),
    "a fused tensor of unequal parts": (
        lambda: save_weights(without("b_k", PARAMS) | {"w_k": numpy.zeros((13, 6, 10))}, "vit_timm"),
        ArgumentValueError,
        ("`w_k`", "=(11, 6, 10)", "received shape=(13, 6, 10)", "k_embed=embed in this layout"),
    ),
    "a bias that must be there": (
        lambda: save_weights(PARAMS, "whisper"),
        ArgumentValueError,
        ("missing: b_q", "missing: b_v", "missing: b_o"),
    ),
    "a bias without a place": (
        lambda: save_weights(PARAMS | {"b_k": numpy.zeros((3, 10))}, "t5"),
        ArgumentValueError,
        ("unknown: b_k", "expected: w_q, w_k, w_v, w_o", "received: b_k, w_k"),
    ),
    "half of the biases": (
        lambda: save_weights(PARAMS | {"b_q": numpy.zeros((6, 10))}, "llama"),
        ArgumentValueError,
        ("missing: b_k", "missing: b_v", "[b_q]"),
    ),
    "two libraries": (
        lambda: load_weights(LLAMA | {"v_proj.weight": to_library(numbers(30, 11), "torch")}, "llama", heads=6),
        ArgumentTypeError,
        ("arrays of the same library", "v_proj.weight of torch"),
    ),
    "rotary_dim odd": (lambda: half_split_pairs(PARAMS, rotary_dim=3), ArgumentValueError, ("even", "rotary_dim=3")),
    "rotary_dim too large": (lambda: interleaved_pairs(PARAMS, rotary_dim=12), ArgumentValueError, ("size=10", "=12")),
    "rotary_dim no integer": (lambda: half_split_pairs(PARAMS, rotary_dim="4"), ArgumentTypeError, ("rotary_dim='4'",)),
    "qk_dim odd": (
        lambda: half_split_pairs(PARAMS | {"w_q": numpy.zeros((11, 6, 5))}),
        ArgumentValueError,
        ("`rotary_dim` must be given", "size=5"),
    ),
    "pairs of an unknown name": (
        lambda: half_split_pairs(LLAMA),
        ArgumentValueError,
        ("missing: w_q", "unknown: q_proj"),
    ),
    "pairs of a wrong rank": (
        lambda: half_split_pairs(PARAMS | {"w_k": numpy.zeros(10)}),
        ArgumentValueError,
        ("`w_k` must have shape=(k_embed, kv_heads, qk_dim)", "received shape=(10,)"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, error, fragments = BAD[case]
    with pytest.raises(error) as raised:
        call()
    assert [fragment for fragment in fragments if fragment not in str(raised.value)] == []


def test_a_layout_that_the_caller_makes() -> None:
    fused = Layout(
        describes="Phi-3",
        tensors={
            "qkv_proj.weight": {
                "w_q": "heads*qk_dim embed",
                "w_k": "kv_heads*qk_dim k_embed",
                "w_v": "kv_heads*v_dim v_embed",
            },
            "o_proj.weight": {"w_o": "out heads*v_dim"},
        },
        equal_axes={"k_embed": "embed", "v_embed": "embed", "v_dim": "qk_dim"},
    )
    state = zeros(o_proj__weight=(11, 60)) | {"qkv_proj.weight": numbers(120, 11)}
    params = load_weights(state, fused, heads=6)
    assert numpy.array_equal(params["w_k"], state["qkv_proj.weight"][60:90].reshape(3, 10, 11).transpose(2, 0, 1))
    assert same_bits(save_weights(params, fused)["qkv_proj.weight"], state["qkv_proj.weight"])
    apart = replace(fused, equal_axes={"k_embed": "embed", "v_embed": "embed"})
    with pytest.raises(ArgumentValueError, match="`kv_heads` must be given"):
        load_weights(state, apart, heads=6)


QUERY, KEY = {"w_q": "heads*qk_dim embed"}, {"w_k": "kv_heads*qk_dim k_embed"}
WRONG_TABLES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no mapping": (
        {"tensors": ["a"]},
        ArgumentTypeError,
        "`Layout.tensors` must be a mapping of names",
    ),
    "no params": (
        {"tensors": {"a": "w_q"}},
        ArgumentTypeError,
        "`Layout.tensors['a']` must be a mapping",
    ),
    "nothing in a tensor": ({"tensors": {"a": {}}}, ArgumentTypeError, "`Layout.tensors['a']` must be a mapping"),
    "unknown param": ({"tensors": {"a": {"w_x": "embed"}}}, ArgumentValueError, "received 'w_x'. Did you mean 'w_"),
    "unknown axis": ({"tensors": {"a": {"w_q": "heads*size embed"}}}, ArgumentValueError, "once, embed, heads, qk_dim"),
    "a number": ({"tensors": {"a": {"w_q": "heads*3*qk_dim embed"}}}, ArgumentValueError, "must name each axis of w_q"),
    "missing axis": ({"tensors": {"a": {"w_q": "heads*qk_dim"}}}, ArgumentValueError, "received 'heads*qk_dim'"),
    "axes twice": ({"tensors": {"a": {"b_o": "out out"}}}, ArgumentValueError, "received 'out out'"),
    "no string": ({"tensors": {"a": {"w_q": 3}}}, ArgumentTypeError, "`Layout.tensors['a']['w_q']` must be a string"),
    "other ranks": (
        {"tensors": {"a": QUERY | {"w_k": "kv_heads qk_dim k_embed"}}},
        ArgumentValueError,
        "`Layout.tensors['a']` must have the same number of axes",
    ),
    "no key": ({"tensors": {"a": QUERY}}, ArgumentValueError, "must hold w_q and w_k, received missing=w_k"),
    "optional key": ({"optional": (("b",),)}, ArgumentValueError, "must hold w_q and w_k, received missing=w_k"),
    "unknown option": (
        {"optional": (("c",),)},
        ArgumentValueError,
        "`Layout.optional` must hold known names",
    ),
    "no groups": ({"optional": ("b",)}, ArgumentTypeError, "`Layout.optional` must be a tuple of tuples"),
    "unknown fused": ({"by_kv_head": ("c",)}, ArgumentValueError, "`Layout.by_kv_head` must hold known names"),
    "unknown gain": ({"one_less": ("norm",)}, ArgumentValueError, "`Layout.one_less` must hold known names"),
    "unknown equal": (
        {"equal_axes": {"v_dim": "size"}},
        ArgumentValueError,
        "`Layout.equal_axes` must hold",
    ),
    "listed reasons": ({"refused": ["c"]}, ArgumentTypeError, "`Layout.refused` must be a mapping"),
    "no separator": ({"separator": ""}, ArgumentTypeError, "`Layout.separator` must be a string"),
}


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_a_table_that_is_wrong(case: str) -> None:
    fields, error, fragment = WRONG_TABLES[case]
    table = Layout("mine", **{"tensors": {"a": QUERY, "b": KEY}} | fields)
    state = {"a": numpy.ones((12, 7), "float32"), "b": numpy.ones((12, 7), "float32")}
    for convert in (lambda: load_weights(state, table, heads=3), lambda: save_weights({}, table)):
        with pytest.raises(error) as raised:
            convert()
        assert fragment in str(raised.value)


def test_every_table_is_right() -> None:
    for table in layouts().values():
        check_layout(table)


LIBRARIES = {
    "numpy": (numpy.float32, numpy.float64, numpy.float16, ml_dtypes.bfloat16),
    "torch": (numpy.float32, ml_dtypes.bfloat16),
    "jax": (numpy.float32, ml_dtypes.bfloat16),
    "tensorflow": (numpy.float32, ml_dtypes.bfloat16),
    "array_api_strict": (numpy.float32,),
}


def of_library(array: Array, library: str) -> Any:
    if library != "array_api_strict":
        return to_library(array, library)
    import array_api_strict

    return array_api_strict.asarray(array)


@pytest.mark.parametrize("library", LIBRARIES)
def test_arrays_of_every_library(library: str) -> None:
    for dtype in LIBRARIES[library]:
        params = params_of(layouts()["gpt2"], dtype=dtype)
        state = save_weights({param: of_library(array, library) for param, array in params.items()}, "gpt2")
        loaded = load_weights(state, "gpt2", heads=6)
        for param, array in loaded.items():
            assert library_of(array) == library
            assert dtype_name(array) == numpy.dtype(dtype).name
            assert same_bits(to_numpy(array), params[param])
        turned = interleaved_pairs(half_split_pairs(loaded, rotary_dim=4), rotary_dim=4)
        assert all(same_bits(to_numpy(turned[param]), params[param]) for param in params)


def test_an_alternating_tensor_is_split_within_each_kv_head() -> None:
    rows = numbers(3 * (2 + 1 + 1) * 5, 11).reshape(3, 4, 5, 11)
    state = {"query_key_value.weight": rows.reshape(60, 11), "dense.weight": numbers(11, 30)}
    params = load_weights(state, "falcon", heads=6)
    for head in range(6):
        assert same_bits(params["w_q"][:, head], rows[head // 2, head % 2].T)
    for kv_head in range(3):
        assert same_bits(params["w_k"][:, kv_head], rows[kv_head, 2].T)
        assert same_bits(params["w_v"][:, kv_head], rows[kv_head, 3].T)
    assert all(same_bits(array, state[name]) for name, array in save_weights(params, "falcon").items())


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "tensorflow"])
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_a_gain_that_is_stored_less_1_is_rounded_once(library: str, dtype: Any) -> None:
    pytest.importorskip(library)
    stored = LLAMA | {f"{part}_norm.weight": numbers(10, seed=seed) / 8 for seed, part in enumerate("qk")}
    narrow = {name: array.astype(dtype) for name, array in stored.items()}
    params = load_weights({name: to_library(array, library) for name, array in narrow.items()}, "gemma3", heads=6)
    saved = save_weights(params, "gemma3")
    for part in "qk":
        weight = narrow[f"{part}_norm.weight"]
        assert (library_of(params[f"{part}_norm"]), dtype_name(params[f"{part}_norm"])) == (library, weight.dtype.name)
        assert same_bits(to_numpy(params[f"{part}_norm"]), (weight.astype("float64") + 1).astype(dtype))
        again = to_numpy(saved[f"{part}_norm.weight"]).astype("float64")
        assert (abs(again - weight.astype("float64")) <= ml_dtypes.finfo(dtype).eps).all()


def test_pairs_are_moved_along_qk_dim() -> None:
    params = params_of(layouts()["qwen3"]) | params_of(layouts()["olmo2"])
    split, partly = half_split_pairs(params), half_split_pairs(params, rotary_dim=4)
    for param in ("w_q", "w_k", "b_q", "b_k", "q_norm", "k_norm", "q_joint_norm", "k_joint_norm"):
        assert same_bits(split[param], params[param][..., [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]])
        assert same_bits(partly[param], params[param][..., [0, 2, 1, 3, 4, 5, 6, 7, 8, 9]])
    assert all(split[param] is params[param] for param in ("w_v", "w_o", "b_v", "b_o"))


def test_inputs_are_not_written_to() -> None:
    for name, layout in layouts().items():
        params = params_of(layout)
        before = {param: array.copy() for param, array in params.items()}
        for array in params.values():
            array.flags.writeable = False
        load_weights(save_weights(params, name), name, heads=6)
        assert all(same_bits(params[param], before[param]) for param in params)


def test_importing_it_imports_no_framework(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    packages = "{'torch', 'jax', 'tensorflow', 'keras', 'safetensors', 'ml_dtypes', 'array_api_compat'}"
    done = python(f"import sys, mha_spec.weights; print({packages} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr
