"""Rotary embedding with frequencies and an attention factor of the caller, on every backend and in the layer."""

from __future__ import annotations

import importlib
import math
import re
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.comparisons import assert_near
from support.numbers import numbers

import mha_spec
from mha_spec import ArgumentTypeError, ArgumentValueError, KVCache, MhaSpecError, reference
from mha_spec.arrays import dtype_name, library_of
from mha_spec.layer_object import LayerSettings
from mha_spec_conformance.judging.bounds import bounds, precision
from mha_spec_conformance.mistakes.rotary_frequencies import TABLES as SCALED_TABLES
from mha_spec_conformance.targets.conversion import to_library, to_numpy
from mha_spec_conformance.testing import assert_rotary

if TYPE_CHECKING:
    from types import ModuleType

    from mha_spec_conformance.suite.cases import Suite

BATCH, HEADS, LENGTH, SIZE, TURNED = 2, 3, 5, 14, 6
FREQUENCIES = numpy.asarray([0.71828, 0.03125, 0.0], dtype="float32")
FACTOR = 1.2079441541679836
POSITIONS = numpy.asarray([[0, 1, 2, 3, 4], [7, 8, 1000, 131071, 3]], dtype="int32")
LIBRARIES = ["numpy", "torch", "jax", "tensorflow"]
OPTIONS: dict[str, Any] = {"rotary_dim": TURNED, "frequencies": FREQUENCIES, "attention_factor": FACTOR}


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def by_loops(x: numpy.ndarray, interleaved: bool) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Turn every pair as a complex number; return also the size of its two parts."""
    turned, size = x.astype(float), numpy.zeros(x.shape)
    for b, h, t in numpy.ndindex(x.shape[:3]):
        for i, frequency in enumerate(FREQUENCIES):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + TURNED // 2)
            angle = float(POSITIONS[b, t]) * float(frequency)
            pair = complex(x[b, h, t, first], x[b, h, t, second]) * complex(math.cos(angle), math.sin(angle)) * FACTOR
            turned[b, h, t, first], turned[b, h, t, second] = pair.real, pair.imag
            size[b, h, t, [first, second]] = FACTOR * abs(x[b, h, t, [first, second]]).sum()
    return turned, size


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_explicit_frequencies_turn_and_the_factor_multiplies(library: str, interleaved: bool) -> None:
    """With positions on the host, cosine, sine, factor, products and sum are rounded, and no angle."""
    pytest.importorskip(library)
    x = numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32")
    turned = mha_spec.rotary_embedding(to_library(x, library), POSITIONS, interleaved=interleaved, **OPTIONS)
    assert (library_of(turned), dtype_name(turned), tuple(turned.shape)) == (library, "float32", x.shape)
    expected, size = by_loops(x, interleaved)
    assert (abs(to_numpy(turned) - expected) <= 4 * 2.0**-24 * size).all()
    assert numpy.array_equal(to_numpy(turned)[..., TURNED:], x[..., TURNED:])


@pytest.mark.parametrize("library", LIBRARIES)
def test_positions_of_the_library_give_the_same(library: str) -> None:
    pytest.importorskip(library)
    x = numbers(BATCH, HEADS, LENGTH, SIZE).astype("float32")
    positions = to_library(POSITIONS, library)
    turned = mha_spec.rotary_embedding(to_library(x, library), positions, **OPTIONS)
    expected, size = by_loops(x, interleaved=False)
    angles = POSITIONS[:, None, :, None] * numpy.resize(FREQUENCIES, TURNED)
    allowed = (4 * size[..., :TURNED] + 10 * angles * size[..., :TURNED]) * 2.0**-24
    assert (abs(to_numpy(turned) - expected)[..., :TURNED] <= allowed).all()


def test_the_frequencies_of_a_base_are_the_base(module: ModuleType) -> None:
    x, options = numbers(BATCH, HEADS, LENGTH, SIZE), {"rotary_dim": 10, "interleaved": True}
    for kind in (list, tuple, numpy.asarray):
        frequencies = kind(7.5 ** (numpy.arange(0, 10, 2) / -10))
        turned = module.rotary_embedding(x, POSITIONS, frequencies=frequencies, **options)
        assert numpy.array_equal(turned, module.rotary_embedding(x, POSITIONS, base=7.5, **options))


def test_a_frequency_of_zero_leaves_its_pair_but_for_the_factor(module: ModuleType) -> None:
    x = numbers(BATCH, HEADS, LENGTH, SIZE)
    assert numpy.array_equal(module.rotary_embedding(x, POSITIONS, frequencies=[0] * 7), x)
    halved = module.rotary_embedding(x, POSITIONS, frequencies=[0] * 7, attention_factor=0.5)
    assert numpy.array_equal(halved, x / 2)


def test_the_factor_alone_multiplies_what_turns(module: ModuleType) -> None:
    x = numbers(BATCH, HEADS, LENGTH, SIZE)
    turned = module.rotary_embedding(x, POSITIONS, rotary_dim=TURNED, attention_factor=2)
    plain = module.rotary_embedding(x, POSITIONS, rotary_dim=TURNED)
    assert numpy.array_equal(turned[..., :TURNED], 2 * plain[..., :TURNED])
    assert numpy.array_equal(turned[..., TURNED:], x[..., TURNED:])


def test_a_config_gives_the_arguments(module: ModuleType) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    frequencies, factor = mha_spec.rotary_frequencies(scaling, 2 * TURNED, 500.0, partial_rotary_factor=0.5)
    x = numbers(1, 1, 2, 2 * TURNED)
    options = {"rotary_dim": 2 * len(frequencies), "frequencies": frequencies, "attention_factor": factor}
    turned = module.rotary_embedding(x, [0, 9], **options)
    first, second = x[0, 0, 1, 2], x[0, 0, 1, 2 + TURNED // 2]
    angle = 9 * float(frequencies[2])
    pair = complex(first, second) * complex(math.cos(angle), math.sin(angle)) * factor
    assert abs(complex(turned[0, 0, 1, 2], turned[0, 0, 1, 2 + TURNED // 2]) - pair) <= 16 * 2.0**-53 * abs(pair)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_assertion_of_kernels_takes_both(dtype: str) -> None:
    x = numbers(BATCH, HEADS, LENGTH, SIZE).astype(dtype)
    assert assert_rotary(reference.rotary_embedding(x, POSITIONS, **OPTIONS), x, POSITIONS, **OPTIONS) <= 1
    for wrong in ({"attention_factor": 1.0}, {"attention_factor": FACTOR**2}, {"frequencies": FREQUENCIES * 1.01}):
        output = reference.rotary_embedding(x, POSITIONS, **OPTIONS | wrong)
        with pytest.raises(AssertionError):
            assert_rotary(output, x, POSITIONS, **OPTIONS)


def test_the_allowance_grows_with_the_factor() -> None:
    arrays = {"x": numbers(1, HEADS, 2, SIZE).astype("float32"), "positions": POSITIONS[1, 2:4]}
    run = precision("float32")
    plain, magnified = (
        bounds("rotary_embedding", arrays, OPTIONS | {"attention_factor": factor}).allowances(run)["output"]
        for factor in (1.0, 8.0)
    )
    turning = [0, 1, 3, 4]  # The last pair has a frequency of 0.
    assert (magnified[..., turning] > 7 * plain[..., turning]).all()
    assert numpy.array_equal(magnified[..., TURNED:], plain[..., TURNED:])
    assert numpy.isfinite(magnified).all()


PARAMS = {
    name: numbers(*shape, seed=seed)
    for seed, (name, shape) in enumerate(
        {"w_q": (7, 4, SIZE), "w_k": (7, 2, SIZE), "w_v": (7, 2, 5), "w_o": (4, 5, 11)}.items()
    )
}


def test_the_layer_turns_queries_and_keys_by_both(module: ModuleType) -> None:
    x = numbers(BATCH, LENGTH, 7, seed=11)
    q, k, v = (numpy.einsum("ble,ehd->bhld", x, PARAMS[name]) for name in ("w_q", "w_k", "w_v"))
    q, k = (reference.rotary_embedding(heads, range(LENGTH), **OPTIONS) for heads in (q, k))
    expected = numpy.einsum("bhqd,hdo->bqo", reference.attention(q, k, v, causal=True), PARAMS["w_o"])
    assert_near(module.multi_head_attention(x, x, x, PARAMS, rotary=OPTIONS, causal=True), expected)


@pytest.mark.parametrize("name", SCALED_TABLES)
def test_goldens_hold_the_tables_of_configs(name: str, suite: Suite) -> None:
    cases = [case for case in suite.cases if case.id.startswith(f"rotary_embedding/frequencies/{name}")]
    assert len(cases) == 2
    for case in cases:
        assert case.options["frequencies"] == list(SCALED_TABLES[name])


def test_decoding_gives_the_same_as_a_single_call(module: ModuleType) -> None:
    x, outputs = numbers(BATCH, LENGTH, 7, seed=11), []
    cache = KVCache.empty(BATCH, 2, LENGTH, SIZE, 5, like=x)
    for part in (x[:, :3], x[:, 3:4], x[:, 4:]):
        output, cache = module.multi_head_attention(part, part, part, PARAMS, rotary=OPTIONS, causal=True, cache=cache)
        outputs.append(output)
    expected = module.multi_head_attention(x, x, x, PARAMS, rotary=OPTIONS, causal=True)
    assert_near(numpy.concatenate(outputs, axis=1), expected)


def test_settings_of_a_layer_compare_hash_and_return_both() -> None:
    first = LayerSettings.of(28, 2, rotary={"frequencies": numpy.arange(7) / 8, "attention_factor": 1.5})
    second = LayerSettings.of(28, 2, rotary=first.arguments["rotary"])
    assert first == second
    assert hash(first) == hash(second)
    assert first.arguments["rotary"] == {"frequencies": tuple(numpy.arange(7) / 8), "attention_factor": 1.5}
    assert first != LayerSettings.of(28, 2, rotary={"frequencies": numpy.arange(7) / 4, "attention_factor": 1.5})


x_of = numbers(BATCH, HEADS, LENGTH, SIZE)
BAD: dict[str, tuple[dict[str, Any], type[MhaSpecError], str, tuple[str, ...]]] = {
    "few": ({"frequencies": [1.0] * 6}, ArgumentValueError, "frequencies", ("(7,)", "shape=(6,)", "rotary_dim=12")),
    "of-the-size": (
        {"frequencies": [1.0] * 7, "rotary_dim": 6},
        ArgumentValueError,
        "frequencies",
        ("(3,)", "shape=(7,)"),
    ),
    "none": ({"frequencies": []}, ArgumentValueError, "frequencies", ("(7,)", "shape=(0,)")),
    "rank": ({"frequencies": numpy.ones((7, 1))}, ArgumentValueError, "frequencies", ("(7,)", "shape=(7, 1).")),
    "rank-0": ({"frequencies": numpy.ones(())}, ArgumentValueError, "frequencies", ("(7,)", "shape=().")),
    "number": ({"frequencies": 0.5}, ArgumentTypeError, "frequencies", ("sequence of numbers", "0.5", "float")),
    "text": ({"frequencies": ["a"] * 7}, ArgumentTypeError, "frequencies", ("sequence of numbers", "'a'")),
    "class": ({"frequencies": numpy.ndarray}, ArgumentTypeError, "frequencies", ("sequence of numbers", "ndarray")),
    "class of frames": (
        {"frequencies": type("Frame", (), {"shape": property(len)})},
        ArgumentTypeError,
        "frequencies",
        ("sequence of numbers", "Frame"),
    ),
    "module": ({"frequencies": math}, ArgumentTypeError, "frequencies", ("sequence of numbers", "math", "module")),
    "flags": ({"frequencies": numpy.ones(7, bool)}, ArgumentTypeError, "frequencies", ("True",)),
    "complex": ({"frequencies": numpy.ones(7, complex)}, ArgumentTypeError, "frequencies", ("1.+0.j",)),
    "nan": ({"frequencies": [math.nan] * 7}, ArgumentValueError, "frequencies", ("finite", "nan")),
    "infinite": ({"frequencies": numpy.full(7, numpy.inf)}, ArgumentValueError, "frequencies", ("finite", "inf")),
    "huge": ({"frequencies": [10**400] * 7}, ArgumentValueError, "frequencies", ("finite",)),
    "negative": ({"frequencies": [-0.5] * 7}, ArgumentValueError, "frequencies", (">=0", "-0.5")),
    "and-base": ({"frequencies": [1.0] * 7, "base": 5e5}, ArgumentValueError, "base", ("frequencies", "500000.0")),
    "factor-zero": ({"attention_factor": 0}, ArgumentValueError, "attention_factor", (">0", "attention_factor=0")),
    "factor-negative": ({"attention_factor": -1.5}, ArgumentValueError, "attention_factor", (">0", "-1.5")),
    "factor-nan": ({"attention_factor": math.nan}, ArgumentValueError, "attention_factor", ("finite", "nan")),
    "factor-huge": ({"attention_factor": 10**400}, ArgumentValueError, "attention_factor", ("finite",)),
    "factor-none": ({"attention_factor": None}, ArgumentTypeError, "attention_factor", ("number", "None")),
    "factor-flag": ({"attention_factor": True}, ArgumentTypeError, "attention_factor", ("number", "True")),
    "factor-array": ({"attention_factor": numpy.ones(7)}, ArgumentTypeError, "attention_factor", ("number",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(module: ModuleType, name: str) -> None:
    wrong, error, argument, parts = BAD[name]
    with pytest.raises(MhaSpecError) as caught:
        module.rotary_embedding(x_of, range(LENGTH), **wrong)
    assert type(caught.value) is error
    message = str(caught.value)
    for part in (f"`{argument}`", *parts):
        assert part in message
    assert re.search(r"\[MHA-ROTARY-[78]\]$", message)
    with pytest.raises(error, match=argument):
        LayerSettings.of(28, 2, rotary=wrong)
