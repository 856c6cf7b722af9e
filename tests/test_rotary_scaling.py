"""The frequencies of models from their configs, against the tables of transformers."""

from __future__ import annotations

import inspect
import math
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rotary_configs import CONFIGS, LONG_FACTOR, SHORT_FACTOR

from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError, rotary_frequencies
from mha_spec_conformance.suite.spec import specification

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDER_NAMES = {"su": "longrope", "mrope": "default"}
SHORT, LONG = numpy.asarray(SHORT_FACTOR, "float32"), numpy.asarray(LONG_FACTOR, "float32")


@contextmanager
def rounded_powers() -> Iterator[list[bool]]:
    """Make torch round powers of float32 once; yield, for each power, whether torch does it by itself."""
    torch = pytest.importorskip("torch")
    original, agreement = torch.Tensor.__rpow__, []

    def power(exponent: Any, base: float) -> Any:
        assert exponent.dtype == torch.float32
        exact = numpy.float64(numpy.float32(base)) ** exponent.double().numpy()
        rounded = torch.from_numpy(exact.astype(numpy.float32))
        agreement.extend((original(exponent, base) == rounded).tolist())
        return rounded

    torch.Tensor.__rpow__ = power
    try:
        yield agreement
    finally:
        torch.Tensor.__rpow__ = original


def of_transformers(
    scaling: dict[str, Any] | None, dim: int, base: float | None, *, seq_len: int | None = None, **outside: Any
) -> tuple[numpy.ndarray, float]:
    """Compute the table of transformers for the same entries of a config."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    keys = {"rope_type": (scaling or {}).get("type", "default"), **(scaling or {})}
    keys["rope_type"] = OLDER_NAMES.get(keys["rope_type"], keys["rope_type"])
    config = transformers.PreTrainedConfig()
    config.head_dim, config.hidden_size, config.num_attention_heads = dim, 2 * dim, 2
    config.max_position_embeddings = 4096
    config.rope_theta = 10000.0 if base is None else base
    for key, value in outside.items():
        setattr(config, key, value)
    config.rope_parameters = keys
    if keys["rope_type"] == "default":  # Each model has its own function of this, which divides positions by 1.
        keys |= {"rope_type": "linear", "factor": 1.0}
    config.standardize_rope_params()
    frequencies, factor = ROPE_INIT_FUNCTIONS[keys["rope_type"]](config, seq_len=seq_len)
    return frequencies.numpy(), factor


def assert_same(ours: tuple[numpy.ndarray, float], theirs: tuple[numpy.ndarray, float]) -> None:
    assert ours[0].dtype == theirs[0].dtype == numpy.float32
    assert ours[0].shape == theirs[0].shape
    assert numpy.array_equal(ours[0].view("int32"), theirs[0].view("int32"))
    assert isinstance(ours[1], float)
    assert ours[1] == theirs[1]


LENGTHS = (None, 1, 4095, 4096, 4097, 32768, 32769, 131072, 1000003)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_those_of_transformers_to_the_last_bit(name: str, seq_len: int | None) -> None:
    dim, base, scaling, outside = CONFIGS[name]
    ours = rotary_frequencies(scaling, dim, base, **outside, seq_len=seq_len)
    with rounded_powers():
        assert_same(ours, of_transformers(scaling, dim, base, **outside, seq_len=seq_len))


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_differs_but_powers_that_torch_rounds_wrongly(name: str) -> None:
    dim, base, scaling, outside = CONFIGS[name]
    ours, _ = rotary_frequencies(scaling, dim, base, **outside)
    with rounded_powers() as agreement:
        of_transformers(scaling, dim, base, **outside)
    theirs, _ = of_transformers(scaling, dim, base, **outside)
    agree = numpy.asarray(agreement + [True] * (len(ours) - len(agreement)))
    assert agree.mean() > 0.9
    assert numpy.array_equal(ours[agree], theirs[agree])
    # A power that is off by one unit in the last place changes a frequency by no more than the next but two.
    assert (abs(ours - theirs) <= 3 * numpy.spacing(ours)).all()


def test_the_sequence_length_changes_dynamic_and_longrope_alone() -> None:
    for name, (dim, base, scaling, outside) in CONFIGS.items():
        tables = [rotary_frequencies(scaling, dim, base, **outside, seq_len=n)[0] for n in (None, 4096, 2**20)]
        assert numpy.array_equal(tables[0], tables[1])
        changes = not numpy.array_equal(tables[0], tables[2])
        assert changes == (name in {"internlm/internlm3-8b-instruct", "microsoft/Phi-3-vision-128k-instruct"})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
factors = st.floats(1, 100)
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": factors},
    "dynamic": {"factor": factors},
    "proportional": {"factor": st.none() | factors},
    "llama3": {
        "factor": factors,
        "low_freq_factor": st.floats(0.1, 4),
        "high_freq_factor": st.floats(4, 40),
        "original_max_position_embeddings": st.integers(1, 2**17),
    },
    "yarn": {
        "factor": st.none() | factors,
        "original_max_position_embeddings": st.integers(64, 2**17),
        "beta_fast": st.none() | st.floats(8, 64),
        "beta_slow": st.none() | st.floats(0.5, 8),
        "mscale": st.none() | st.floats(0, 2),
        "mscale_all_dim": st.none() | st.floats(0, 2),
        "attention_factor": st.none() | st.floats(0.5, 2),
        "truncate": st.booleans(),
    },
}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(
    st.data(),
    st.integers(2, 128),
    st.floats(2, 1e8) | st.integers(2, 10**8),
    st.sampled_from([1.0, 0.25, 0.4, 0.5]),
    st.none() | st.integers(0, 2**20),
)
def test_any_parameters_give_the_same_bits(
    kind: str, data: st.DataObject, half: int, base: float, share: float, seq_len: int | None
) -> None:
    scaling = {"rope_type": kind} | {key: data.draw(strategy) for key, strategy in KINDS[kind].items()}
    dim, outside = 2 * half, {"max_position_embeddings": 4096}
    turned = int(dim * share)
    if turned < 3 or (turned % 2 and kind == "yarn"):  # There transformers raises an error.
        return
    if kind in ("linear", "dynamic", "proportional"):
        scaling = {key: value for key, value in scaling.items() if value is not None}
    if share != 1:
        scaling["partial_rotary_factor"] = share
    ours = rotary_frequencies(scaling, dim, base, **outside, seq_len=seq_len)
    with rounded_powers():
        assert_same(ours, of_transformers(dict(scaling), dim, base, **outside, seq_len=seq_len))


RARE: dict[str, dict[str, Any]] = {
    "equal-bounds": {"beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    "bounds-below-the-first-pair": {"original_max_position_embeddings": 4, "truncate": False},
    "equal-bounds-at-a-pair": {"original_max_position_embeddings": 6},
    "two-magnitudes": {"mscale": 0.707, "mscale_all_dim": 1.25},
    "a-single-magnitude": {"mscale": 0.707},
    "a-magnitude-of-zero": {"mscale": 0.707, "mscale_all_dim": 0},
    "factor-of-one": {"factor": 1.0, "mscale": 0.5, "mscale_all_dim": 2.0},
}


@pytest.mark.parametrize("name", RARE)
def test_rare_parameters_of_yarn_give_the_same_bits(name: str) -> None:
    scaling = YARN | RARE[name]
    with rounded_powers():
        assert_same(rotary_frequencies(scaling, 40, 700.0), of_transformers({**scaling}, 40, 700.0))


def test_longrope_chooses_its_factors_by_the_length() -> None:
    dim, base, scaling, outside = CONFIGS["microsoft/Phi-3-vision-128k-instruct"]
    powers = 1 / rotary_frequencies(None, dim, base)[0].astype(float)
    for seq_len, listed in ((4096, SHORT), (4097, LONG)):
        frequencies, factor = rotary_frequencies(scaling, dim, base, **outside, seq_len=seq_len)
        assert (abs(frequencies * listed * powers - 1) <= 4 * 2.0**-24).all()
        assert factor == math.sqrt(1 + math.log(32) / math.log(4096))
    scaled = scaling | {"short_mscale": 1.25, "long_mscale": 1.5}
    assert [rotary_frequencies(scaled, dim, base, **outside, seq_len=n)[1] for n in (None, 4097)] == [1.25, 1.5]


def test_what_the_dictionary_leaves_out_is_a_keyword() -> None:
    inside = {"rope_type": "yarn", "rope_theta": 7e5, "factor": 4.0, "partial_rotary_factor": 0.5}
    first = rotary_frequencies(inside | {"original_max_position_embeddings": 2048}, 64)
    outside = {"base": numpy.float64(7e5), "partial_rotary_factor": 0.5, "original_max_position_embeddings": 2048}
    second = rotary_frequencies({"type": "yarn", "factor": numpy.int64(4), "mscale": None}, 64, **outside)
    both = rotary_frequencies(inside, numpy.int32(64), **outside, max_position_embeddings=8192)
    implied = {key: value for key, value in inside.items() if key != "factor"}
    for frequencies, factor in (second, both, rotary_frequencies(implied, 64, **outside, max_position_embeddings=8192)):
        assert numpy.array_equal(frequencies, first[0])
        assert factor == first[1] == 1 + 0.1 * math.log(4)
    assert first[0].shape == (16,)


def test_the_dictionary_is_not_written_to() -> None:
    for dim, base, scaling, outside in CONFIGS.values():
        before = None if scaling is None else {**scaling}
        rotary_frequencies(scaling, dim, base, **outside)
        assert scaling == before


LLAMA3 = CONFIGS["meta-llama/Llama-3.1-8B"].scaling or {}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0}
LONGROPE["original_max_position_embeddings"] = 4096
BAD: dict[str, tuple[dict[str, Any], type[MhaSpecError], tuple[str, ...]]] = {
    "scaling-text": ({"scaling": "yarn"}, ArgumentTypeError, ("`scaling`", "dictionary", "'yarn'")),
    "scaling-number": ({"scaling": 4.0}, ArgumentTypeError, ("`scaling`", "float")),
    "nested": (
        {"scaling": {"full_attention": YARN, "sliding_attention": {}}},
        ArgumentValueError,
        ("`scaling`", "full_attention, sliding_attention", "scaling['full_attention']"),
    ),
    "type-unknown": ({"scaling": {"type": "ntk"}}, ArgumentValueError, ("`type`", "llama3", "'ntk'")),
    "type-number": ({"scaling": {"rope_type": 3}}, ArgumentTypeError, ("`rope_type`", "string", "3")),
    "axial": ({"scaling": {"rope_type": "axial"}}, ArgumentValueError, ("`rope_type`", "'axial'")),
    "unknown": ({"scaling": {"type": "dynamic", "factor": 2.0, "alpha": 9}}, ArgumentTypeError, ("'alpha'",)),
    "of-another": ({"scaling": {"type": "linear", "factor": 2.0, "beta_fast": 9}}, ArgumentTypeError, ("'beta_fast'",)),
    "no-factor": ({"scaling": {"type": "linear"}}, ArgumentValueError, ("`scaling`", "factor")),
    "null-factor": ({"scaling": {"type": "linear", "factor": None}}, ArgumentValueError, ("`scaling`", "factor")),
    "factor-text": ({"scaling": {"type": "linear", "factor": "2"}}, ArgumentTypeError, ("`factor`", "number", "'2'")),
    "factor-flag": ({"scaling": {"type": "linear", "factor": True}}, ArgumentTypeError, ("`factor`", "True")),
    "inverted": (
        {"scaling": {"type": "linear", "factor": 0.25}},
        ArgumentValueError,
        ("`factor`", "factor>=1", "0.25"),
    ),
    "nan": ({"scaling": {"type": "linear", "factor": math.nan}}, ArgumentValueError, ("`factor`", "nan")),
    "huge": ({"scaling": {"type": "linear", "factor": 10**400}}, ArgumentValueError, ("`factor`", "finite")),
    "no-low": (
        {"scaling": {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}},
        ArgumentValueError,
        ("low_freq_factor",),
    ),
    "low-zero": ({"scaling": LLAMA3 | {"low_freq_factor": 0}}, ArgumentValueError, ("`low_freq_factor`", ">0")),
    "high-low": (
        {"scaling": LLAMA3 | {"high_freq_factor": 0.5}},
        ArgumentValueError,
        ("`high_freq_factor`", ">=low_freq_factor=1.0", "0.5"),
    ),
    "no-length": (
        {"scaling": {"type": "yarn", "factor": 4.0}},
        ArgumentValueError,
        ("`original_max_position_embeddings`", "None"),
    ),
    "no-length-llama3": (
        {"scaling": LLAMA3 | {"original_max_position_embeddings": None}},
        ArgumentValueError,
        ("`original_max_position_embeddings`",),
    ),
    "length-float": (
        {"scaling": YARN | {"original_max_position_embeddings": 4096.0}},
        ArgumentTypeError,
        ("`original_max_position_embeddings`", "integer", "4096.0"),
    ),
    "length-zero": (
        {"scaling": YARN, "max_position_embeddings": 0, "original_max_position_embeddings": 0},
        ArgumentValueError,
        ("`original_max_position_embeddings`", "0"),
    ),
    "dynamic-length": (
        {"scaling": {"type": "dynamic", "factor": 2.0}},
        ArgumentValueError,
        ("`max_position_embeddings`", "None"),
    ),
    "yarn-no-factor": (
        {"scaling": {"type": "yarn", "original_max_position_embeddings": 4096}},
        ArgumentValueError,
        ("`factor`", "max_position_embeddings"),
    ),
    "betas": ({"scaling": YARN | {"beta_fast": 0.5}}, ArgumentValueError, ("`beta_fast`", ">=beta_slow=1", "0.5")),
    "truncate": ({"scaling": YARN | {"truncate": 1}}, ArgumentTypeError, ("`truncate`", "True or False")),
    "attention-factor": ({"scaling": YARN | {"attention_factor": -1.0}}, ArgumentValueError, ("`attention_factor`",)),
    "base-of-yarn": ({"scaling": YARN, "base": 1.0}, ArgumentValueError, ("`rope_theta`", "base", ">1")),
    "few-factors": (
        {"scaling": LONGROPE | {"long_factor": [1.0] * 7}},
        ArgumentValueError,
        ("`long_factor`", "8 pairs", "length 7"),
    ),
    "factors-number": ({"scaling": LONGROPE | {"short_factor": 2.0}}, ArgumentTypeError, ("`short_factor`", "list")),
    "factors-text": ({"scaling": LONGROPE | {"short_factor": ["a"] * 8}}, ArgumentTypeError, ("`short_factor`",)),
    "factors-zero": ({"scaling": LONGROPE | {"short_factor": [0] * 8}}, ArgumentValueError, ("`short_factor`",)),
    "one-mscale": ({"scaling": LONGROPE | {"long_mscale": 1.2}}, ArgumentValueError, ("`short_mscale`", "None")),
    "two-bases": ({"scaling": {"rope_theta": 5.0}, "base": 6.0}, ArgumentValueError, ("`base`", "5.0", "6.0")),
    "two-lengths": (
        {"scaling": YARN, "original_max_position_embeddings": 8192},
        ArgumentValueError,
        ("`original_max_position_embeddings`", "4096", "8192"),
    ),
    "base-array-and-number": (
        {"scaling": {"rope_theta": 5.0}, "base": numpy.ones(2)},
        ArgumentTypeError,
        ("`base` must be rope_theta of `scaling`, 5.0",),
    ),
    "base-tiny": ({"base": 1e-300}, ArgumentValueError, ("`base`", "finite in float32", "base=1e-300")),
    "base-subnormal": ({"base": 1e-45}, ArgumentValueError, ("`base`", "finite in float32", "base=1e-45")),
    "factors-tiny": (
        {"scaling": LONGROPE | {"short_factor": [1e-300] * 8}},
        ArgumentValueError,
        ("`scaling`", "finite in float32"),
    ),
    "base-zero": ({"base": 0}, ArgumentValueError, ("`rope_theta`", "base", ">0")),
    "base-text": ({"base": "10000"}, ArgumentTypeError, ("`rope_theta`", "base", "'10000'")),
    "base-infinite": ({"base": math.inf}, ArgumentValueError, ("`rope_theta`", "finite")),
    "share-zero": ({"partial_rotary_factor": 0.0}, ArgumentValueError, ("`partial_rotary_factor`", "0.0")),
    "share-two": ({"partial_rotary_factor": 2}, ArgumentValueError, ("`partial_rotary_factor`", "<=1", "2")),
    "share-tiny": ({"partial_rotary_factor": 0.01}, ArgumentValueError, ("`dim`", "0.01")),
    "odd": ({"dim": 15}, ArgumentValueError, ("`dim`", "dim=15")),
    "dim-huge": ({"dim": 10**400}, ArgumentValueError, ("`dim` must be dim<=1048576",)),
    "dim-of-no-memory": ({"dim": 2**40}, ArgumentValueError, ("`dim` must be dim<=1048576", "dim=1099511627776")),
    "dim-zero": ({"dim": 0}, ArgumentValueError, ("`dim`", "dim>=2")),
    "dim-float": ({"dim": 16.0}, ArgumentTypeError, ("`dim`", "integer")),
    "seq-len": ({"seq_len": -1}, ArgumentValueError, ("`seq_len`", "seq_len>=0")),
    "seq-len-float": ({"seq_len": 5.0}, ArgumentTypeError, ("`seq_len`", "integer")),
    "dynamic-pair": (
        {"scaling": {"type": "dynamic", "factor": 2.0}, "dim": 2, "max_position_embeddings": 8},
        ArgumentValueError,
        ("`dim`", "dim=2"),
    ),
    "dynamic-far": (
        {"scaling": {"type": "dynamic", "factor": 1e30}, "max_position_embeddings": 8, "seq_len": 10**400},
        ArgumentValueError,
        ("`seq_len`", "float32"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(name: str) -> None:
    wrong, error, parts = BAD[name]
    with pytest.raises(MhaSpecError) as caught:
        rotary_frequencies(**{"scaling": None, "dim": 16} | wrong)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value).endswith("[MHA-ROTARY-16]")


def test_numbers_near_the_ends_of_float32_give_no_warning() -> None:
    for scaling in (YARN | {"factor": 3e38}, {"type": "linear", "factor": 3e38}, LLAMA3 | {"low_freq_factor": 1e-300}):
        frequencies, _ = rotary_frequencies(scaling, 16, 3e38)
        assert numpy.isfinite(frequencies).all()
    assert rotary_frequencies({"factor": 8.0, "type": "linear"}, 6, 1e-30)[0][2] > 1e18


def test_the_call_is_that_of_the_specification() -> None:
    (call,) = {*re.findall(r"^    rotary_frequencies\((.*?)\)$", specification(), flags=re.DOTALL | re.MULTILINE)}
    parameters = inspect.signature(rotary_frequencies).parameters.values()
    written = re.findall(r"(\w+)(=None)?", call.replace("*,", ""))
    assert written == [(p.name, "" if p.default is p.empty else "=None") for p in parameters]
