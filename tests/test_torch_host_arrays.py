"""Numbers of NumPy in every order of bytes and of elements, which PyTorch does not take as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.comparisons import assert_equal
from support.numbers import numbers
from support.torch_world import tensor

import mha_spec_torch
from mha_spec import KVCache, PagedKVCache, WindowKVCache

if TYPE_CHECKING:
    from collections.abc import Callable

Form = Any
"""A function that writes the same numbers in another way."""

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, SIZE, SLOTS = 3, 4, 2, 5, 7, 6, 8
ATTENTION = {
    name: tensor(numbers(BATCH, heads, length, SIZE), "float32")
    for name, heads, length in (("query", HEADS, Q_LEN), ("key", KV_HEADS, KV_LEN), ("value", KV_HEADS, KV_LEN))
}
PARAMS = {
    name: tensor(numbers(*shape, seed=seed), "float32")
    for seed, (name, shape) in enumerate(
        {
            "w_q": (7, HEADS, SIZE),
            "w_k": (7, KV_HEADS, SIZE),
            "w_v": (7, KV_HEADS, SIZE),
            "w_o": (HEADS, SIZE, 11),
        }.items()
    )
}
TOKENS = tensor(numbers(BATCH, 2, 7), "float32")
SLOT = tensor(numbers(BATCH, KV_HEADS, SLOTS, SIZE), "float32")
INTEGERS, COUNTS = numpy.array([4, 0, 1]), numpy.array([2, 0, 1])


def reversed_in_memory(x: numpy.ndarray) -> numpy.ndarray:
    axes = tuple(slice(None, None, -1) for _ in x.shape)
    return x[axes].copy()[axes]


FORMS: dict[str, Form] = {
    "bytes": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "reversed": reversed_in_memory,
}


def attend(**options: Any) -> Any:
    return mha_spec_torch.attention(**ATTENTION, **options)


def segments(form: Form) -> Any:
    ids = numpy.arange(KV_LEN) // 3 * numpy.ones((BATCH, 1), "int64")
    return attend(q_segment_ids=form(ids[:, :Q_LEN]), kv_segment_ids=form(ids))


def decode(cache: Any, **options: Any) -> Any:
    return mha_spec_torch.multi_head_attention(
        TOKENS, TOKENS, TOKENS, PARAMS, cache=cache, causal=True, window=(4, 0), rotary={}, **options
    )


def paged(form: Form) -> PagedKVCache:
    table = numpy.arange(2 * BATCH)[::-1].reshape(BATCH, 2)
    blocks = SLOT.transpose(1, 2).reshape(2 * BATCH, SLOTS // 2, KV_HEADS, SIZE)
    return PagedKVCache(blocks, blocks, form(INTEGERS), form(table))


CALLS: dict[str, Callable[[Form], Any]] = {
    "kv_lengths": lambda form: attend(kv_lengths=form(INTEGERS), causal=True, q_offset="lower_right"),
    "q_offset": lambda form: attend(q_offset=form(INTEGERS), causal=True),
    "counts that are not read": lambda form: mha_spec_torch.append_cache(
        KVCache(SLOT, SLOT, form(INTEGERS)), SLOT[:, :, :2], SLOT[:, :, :2], tensor(COUNTS, "int32")
    ),
    "segments": segments,
    "bias": lambda form: mha_spec_torch.alibi_bias(HEADS, 3, 4, q_offset=form(INTEGERS)),
    "positions": lambda form: mha_spec_torch.rotary_embedding(SLOT, form(numpy.arange(SLOTS))),
    "floats": lambda form: mha_spec_torch.rotary_embedding(SLOT, form(numpy.arange(SLOTS) / 3)),
    "frequencies": lambda form: mha_spec_torch.rotary_embedding(
        SLOT, numpy.arange(SLOTS), frequencies=form(numpy.array([1, 0.5, 0.25]))
    ),
    "cache": lambda form: decode(KVCache(SLOT, SLOT, form(INTEGERS)), kv_lengths=form(COUNTS)),
    "window cache": lambda form: decode(WindowKVCache(SLOT, SLOT, form(INTEGERS)), kv_lengths=form(COUNTS)),
    "paged cache": lambda form: decode(paged(form), kv_lengths=form(COUNTS)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CALLS)
def test_numbers_mean_the_same_in_every_order_of_bytes_and_elements(name: str, form: str) -> None:
    """A library that reads files of another machine, or slices backwards, has such arrays (MHA-PURE-2)."""
    assert_equal(CALLS[name](FORMS[form]), CALLS[name](numpy.copy))


def test_positions_beyond_int64_are_numbers() -> None:
    """The position has no fraction and a known sign; what it turns by is uncertain in every type (MHA-ROTARY-5)."""
    positions = [2**70, *range(1, SLOTS)]
    expected = mha_spec_torch.rotary_embedding(SLOT, numpy.array(positions, "float64"))
    assert_equal(mha_spec_torch.rotary_embedding(SLOT, positions), expected)
