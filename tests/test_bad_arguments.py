"""Every bad argument gets an error of ours that names it, the expected and the received value, and a fix."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy
import pytest
from support.calls import BATCH, HEADS, KV_HEADS, KV_LEN, Q_LEN, QK_DIM, V_DIM, arguments, operand

from mha_spec import ArgumentTypeError, ArgumentValueError, MhaSpecError

if TYPE_CHECKING:
    from types import ModuleType

ones = numpy.ones
BAD = {
    "query-rank": (
        {"query": operand(HEADS, Q_LEN, QK_DIM)},
        ArgumentValueError,
        "query",
        "rank 4, (batch, heads, q_len, qk_dim)",
        "shape=(6, 5, 11)",
        "",
    ),
    "value-rank": (
        {"value": operand(KV_LEN, V_DIM)},
        ArgumentValueError,
        "value",
        "rank 4, (batch, kv_heads, kv_len, v_dim)",
        "shape=(7, 13)",
        "",
    ),
    "query-list": ({"query": [[1.0]]}, ArgumentTypeError, "query", "an array", "list", ""),
    "key-none": ({"key": None}, ArgumentTypeError, "key", "an array", "NoneType", ""),
    "query-integers": (
        {"query": ones((BATCH, HEADS, Q_LEN, QK_DIM), int)},
        ArgumentTypeError,
        "query",
        "float64, float32, float16, bfloat16",
        "int64",
        "",
    ),
    "mixed-dtypes": (
        {"key": operand(BATCH, KV_HEADS, KV_LEN, QK_DIM, dtype="float64")},
        ArgumentTypeError,
        "key",
        "dtype=float32",
        "dtype=float64",
        "Convert",
    ),
    "head-multiple": (
        {"query": operand(BATCH, 5, Q_LEN, QK_DIM)},
        ArgumentValueError,
        "query",
        "multiple of kv_heads=3",
        "heads=5",
        "(batch, heads, length, size)",
    ),
    "no-heads": (
        {"query": operand(BATCH, 0, Q_LEN, QK_DIM)},
        ArgumentValueError,
        "query",
        "heads>=1",
        "shape=(2, 0, 5, 11)",
        "Only batch, q_len and kv_len may be 0",
    ),
    "no-size": (
        {"query": operand(BATCH, HEADS, Q_LEN, 0), "key": operand(BATCH, KV_HEADS, KV_LEN, 0)},
        ArgumentValueError,
        "query",
        "qk_dim>=1",
        "shape=(2, 6, 5, 0)",
        "Only batch, q_len and kv_len may be 0",
    ),
    "batch": ({"key": operand(3, KV_HEADS, KV_LEN, QK_DIM)}, ArgumentValueError, "key", "batch=2", "batch=3", ""),
    "qk-dim": ({"key": operand(BATCH, KV_HEADS, KV_LEN, 10)}, ArgumentValueError, "key", "qk_dim=11", "qk_dim=10", ""),
    "kv-len": (
        {"value": operand(BATCH, KV_HEADS, 8, V_DIM)},
        ArgumentValueError,
        "value",
        "(batch, kv_heads, kv_len)=(2, 3, 7)",
        "shape=(2, 3, 8, 13)",
        "",
    ),
    "mask-of-integers": (
        {"mask": ones((1, 1, 1, KV_LEN), int)},
        ArgumentTypeError,
        "mask",
        "boolean (True = may attend)",
        "int64",
        "mask != 0",
    ),
    "mask-of-floats": (
        {"mask": ones((1, 1, 1, KV_LEN))},
        ArgumentTypeError,
        "mask",
        "boolean (True = may attend)",
        "float64",
        "`bias`",
    ),
    "mask-rank": (
        {"mask": ones((Q_LEN, KV_LEN), bool)},
        ArgumentValueError,
        "mask",
        "rank 4",
        "shape=(5, 7)",
        "reshape",
    ),
    "mask-not-broadcastable": (
        {"mask": ones((1, 2, 1, KV_LEN), bool)},
        ArgumentValueError,
        "mask",
        "(2, 6, 5, 7)",
        "shape=(1, 2, 1, 7)",
        "reshape it first",
    ),
    "mask-list": ({"mask": [[True]]}, ArgumentTypeError, "mask", "an array of rank 4", "list", ""),
    "dropout-mask-of-floats": (
        {"dropout_mask": ones((1, 1, Q_LEN, KV_LEN))},
        ArgumentTypeError,
        "dropout_mask",
        "True = keep",
        "float64",
        "`bias`",
    ),
    "bias-of-booleans": (
        {"bias": ones((1, 1, Q_LEN, KV_LEN), bool)},
        ArgumentTypeError,
        "bias",
        "float64, float32",
        "bool",
        "`mask`",
    ),
    "bias-not-broadcastable": (
        {"bias": ones((1, 1, Q_LEN, 6))},
        ArgumentValueError,
        "bias",
        "(2, 6, 5, 7)",
        "shape=(1, 1, 5, 6)",
        "reshape it first",
    ),
    "sinks-shape": ({"sinks": ones(KV_HEADS)}, ArgumentValueError, "sinks", "(heads,)=(6,)", "shape=(3,)", ""),
    "sinks-of-integers": ({"sinks": ones(HEADS, int)}, ArgumentTypeError, "sinks", "float64, float32", "int64", ""),
    "causal-ambiguous": (
        {"causal": True},
        ArgumentValueError,
        "q_offset",
        'q_offset="upper_left" (0',
        "q_offset=None",
        'q_offset="lower_right" (2',
    ),
    "window-ambiguous": (
        {"window": (2, 0)},
        ArgumentValueError,
        "q_offset",
        'q_offset="upper_left" (0',
        "q_offset=None",
        "window=(2, 0)",
    ),
    "causal-with-lengths": (
        {"query": operand(BATCH, HEADS, KV_LEN, QK_DIM), "causal": True, "kv_lengths": [3, 7]},
        ArgumentValueError,
        "q_offset",
        "kv_lengths - q_len",
        "q_offset=None",
        "kv_lengths are given",
    ),
    "causal-number": ({"causal": 1}, ArgumentTypeError, "causal", "True or False", "causal=1", ""),
    "one-segment-array": (
        {"q_segment_ids": ones((BATCH, Q_LEN), int)},
        ArgumentValueError,
        "kv_segment_ids",
        "`q_segment_ids`",
        "kv_segment_ids=None",
        "same array",
    ),
    "other-segment-array": (
        {"kv_segment_ids": ones((BATCH, KV_LEN), int)},
        ArgumentValueError,
        "q_segment_ids",
        "`kv_segment_ids`",
        "q_segment_ids=None",
        "same array",
    ),
    "segments-shape": (
        {"q_segment_ids": ones((BATCH, KV_LEN), int), "kv_segment_ids": ones((BATCH, KV_LEN), int)},
        ArgumentValueError,
        "q_segment_ids",
        "(batch, q_len)=(2, 5)",
        "shape=(2, 7)",
        "",
    ),
    "segments-of-floats": (
        {"q_segment_ids": ones((BATCH, Q_LEN)), "kv_segment_ids": ones((BATCH, KV_LEN))},
        ArgumentTypeError,
        "q_segment_ids",
        "integer",
        "float64",
        "",
    ),
    "window-number": (
        {"window": 3, "q_offset": 0},
        ArgumentTypeError,
        "window",
        "pair (left, right)",
        "window=3",
        "window=(n - 1, 0)",
    ),
    "window-negative": (
        {"window": (-1, 0), "q_offset": 0},
        ArgumentValueError,
        "window",
        "0<=left<=2**30",
        "left=-1",
        "left=None for no bound",
    ),
    "window-float": (
        {"window": (1.0, 0), "q_offset": 0},
        ArgumentTypeError,
        "window",
        "integers or None",
        "left=1.0",
        "",
    ),
    "window-too-long": (
        {"window": (0, 2**31), "q_offset": 0},
        ArgumentValueError,
        "window",
        "2**30",
        f"right={2**31}",
        "right=None for no bound",
    ),
    "softcap-zero": (
        {"softcap": 0.0},
        ArgumentValueError,
        "softcap",
        "1.2e-38<=softcap<=",
        "softcap=0.0",
        "None means no cap",
    ),
    "softcap-negative": (
        {"softcap": -30.0},
        ArgumentValueError,
        "softcap",
        "1.2e-38<=softcap<=",
        "softcap=-30.0",
        "None means no cap",
    ),
    "softcap-infinite": (
        {"softcap": math.inf},
        ArgumentValueError,
        "softcap",
        "finite",
        "softcap=inf",
        "None means no cap",
    ),
    "scale-nan": ({"scale": math.nan}, ArgumentValueError, "scale", "finite", "scale=nan", "1/sqrt(qk_dim)"),
    "scale-array": ({"scale": ones(())}, ArgumentTypeError, "scale", "Python number", "ndarray", ""),
    "dropout-one": (
        {"dropout_rate": 1.0},
        ArgumentValueError,
        "dropout_rate",
        "0<=dropout_rate<1",
        "dropout_rate=1.0",
        "",
    ),
    "dropout-negative": (
        {"dropout_rate": -0.1},
        ArgumentValueError,
        "dropout_rate",
        "0<=dropout_rate<1",
        "dropout_rate=-0.1",
        "",
    ),
    "dropout-text": ({"dropout_rate": "0.1"}, ArgumentTypeError, "dropout_rate", "Python number", "'0.1'", ""),
    "kv-lengths-beyond": ({"kv_lengths": [8, 0]}, ArgumentValueError, "kv_lengths", "0<=kv_lengths<=kv_len=7", "8", ""),
    "kv-lengths-negative": (
        {"kv_lengths": numpy.asarray([3, -1])},
        ArgumentValueError,
        "kv_lengths",
        "0<=kv_lengths",
        "-1",
        "",
    ),
    "q-lengths-beyond": ({"q_lengths": (5, 6)}, ArgumentValueError, "q_lengths", "0<=q_lengths<=q_len=5", "6", ""),
    "lengths-shape": (
        {"kv_lengths": numpy.asarray([7])},
        ArgumentValueError,
        "kv_lengths",
        "(batch,)=(2,)",
        "shape=(1,)",
        "",
    ),
    "lengths-of-floats": (
        {"kv_lengths": numpy.asarray([7.0, 7.0])},
        ArgumentTypeError,
        "kv_lengths",
        "integer",
        "float64",
        "",
    ),
    "lengths-number": ({"kv_lengths": 7}, ArgumentTypeError, "kv_lengths", "(batch,)=(2,)", "kv_lengths=7", ""),
    "offset-too-far": (
        {"q_offset": 2**30 + 1, "causal": True},
        ArgumentValueError,
        "q_offset",
        "2**30",
        str(2**30 + 1),
        "",
    ),
    "offset-float": ({"q_offset": 1.5, "causal": True}, ArgumentTypeError, "q_offset", "integers", "1.5", ""),
    "unknown-keyword": ({"is_causal": True}, ArgumentTypeError, "is_causal", "not an option", "is_causal", "`causal`"),
    "unknown-mask": (
        {"attn_mask": ones((1, 1, 1, KV_LEN), bool)},
        ArgumentTypeError,
        "attn_mask",
        "not an option",
        "attn_mask",
        "`mask`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_refused(attention_module: ModuleType, name: str) -> None:
    changed, error, argument, expectation, received, fix = BAD[name]
    with pytest.raises(MhaSpecError) as caught:
        attention_module.attention(**arguments(**changed))
    assert type(caught.value) is error
    message = str(caught.value)
    assert f"`{argument}`" in message
    for part in (expectation, received, fix):
        assert part in message
    assert re.search(r"\[MHA-[A-Z]+-\d+\]$", message)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(BAD) - {"value-rank", "kv-len", "dropout-mask-of-floats", "dropout-one", "dropout-negative", "dropout-text"}
    ),
)
def test_weights_and_gradients_refuse_the_same(attention_module: ModuleType, name: str) -> None:
    changed, error, argument, *_ = BAD[name]
    given = arguments(**changed)
    without_value = {key: value for key, value in given.items() if key != "value"}
    grad_output = operand(BATCH, HEADS, Q_LEN, V_DIM)
    for call in (
        lambda: attention_module.attention_weights(**without_value),
        lambda: attention_module.attention_vjp(grad_output, **given),
    ):
        with pytest.raises(error, match=f"`{argument}`"):
            call()
