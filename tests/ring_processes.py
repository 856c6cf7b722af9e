"""Calls over four processes under gloo; test_torch_ring runs this file, which forks after its imports.

It prints a JSON object with a list of faults, or a number, for each name.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import numpy
import torch
import torch.distributed as dist
from support.comparisons import assert_near
from support.goldens import cases, failures, names
from support.numbers import numbers

import mha_spec_torch
from mha_spec.errors import ArgumentTypeError, ArgumentValueError
from mha_spec.sharding import Piece, shard_order
from mha_spec_torch import groups, ring, shards

RANKS = 4
BATCH, HEADS, KV_HEADS, SIZE, V_SIZE = 2, 8, 4, 5, 3
SIDES = {"q_segment_ids": "q", "kv_segment_ids": "kv"}
TIMEOUT = 5
"""The seconds after which a rank that does not answer is an error."""


def tensors(q_len: int, kv_len: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    shapes = (BATCH, HEADS, q_len, SIZE), (BATCH, KV_HEADS, kv_len, SIZE), (BATCH, KV_HEADS, kv_len, V_SIZE), (HEADS,)
    return [torch.from_numpy(numbers(*shape, seed=seed)).to(dtype) for seed, shape in enumerate(shapes)]


def ids(length: int) -> torch.Tensor:
    return torch.from_numpy(numpy.sort(numpy.arange(BATCH * length).reshape(BATCH, length) * 7 % 5, 1))


def dealt(array: torch.Tensor, order: numpy.ndarray, axis: int) -> torch.Tensor:
    """Return the tokens of this rank."""
    places = torch.from_numpy(numpy.split(order, RANKS)[dist.get_rank()].copy())
    return array.index_select(axis, places)


def results(call: Any, operands: list[Any], cotangents: Any) -> list[Any]:
    """Return output and lse, and the gradients of query, key, value and sinks."""
    operands = [operand.detach().clone().requires_grad_() for operand in operands]
    outputs = call(*operands)
    gradients = torch.autograd.grad(outputs, operands, cotangents(outputs))
    return [result.detach() for result in (*outputs, *gradients)]


def faults(form: str, layout: str, lengths: tuple[int, int], options: dict[str, Any], **settings: Any) -> list[str]:
    """Compare this rank's shard of a call with the same call in one process."""
    operands, order = tensors(*lengths), settings.get("order", layout)
    kv_order = shard_order(order, RANKS, lengths[1])
    q_order = None if form == "sharded_kv" else shard_order(order, RANKS, lengths[0])

    def cotangents(outputs: Any) -> list[torch.Tensor]:
        return [torch.from_numpy(numbers(*output.shape, seed=9)) for output in outputs]

    def whole(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return mha_spec_torch.attention(query, key, value, sinks=sinks, return_lse=True, **options)

    def of_queries(array: torch.Tensor, axis: int = 2) -> torch.Tensor:
        return array if q_order is None else dealt(array, q_order, axis)

    def of_rank(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        local = dict(options)
        if "q_segment_ids" in local:
            local["q_segment_ids"] = of_queries(local["q_segment_ids"], 1)
            local["kv_segment_ids"] = dealt(local["kv_segment_ids"], kv_order, 1)
        function = getattr(mha_spec_torch, f"{form}_attention")
        return function(query, key, value, sinks=sinks, layout=layout, return_lse=True, **local)

    output, lse, of_query, of_key, of_value, of_sinks = results(whole, operands, cotangents)
    expected = [
        *map(of_queries, (output, lse, of_query)),
        *(dealt(gradient, kv_order, 2) for gradient in (of_key, of_value)),
        of_sinks,
    ]
    query, key, value, sinks = operands
    local = [of_queries(query), dealt(key, kv_order, 2), dealt(value, kv_order, 2), sinks]
    whole_outputs = [torch.empty_like(output), torch.empty_like(lse)]
    got = results(of_rank, local, lambda _: [of_queries(cotangent) for cotangent in cotangents(whole_outputs)])
    found = []
    for name, result, other in zip(("output", "lse", "query", "key", "value", "sinks"), got, expected, strict=True):
        try:
            assert_near(result, other)
        except AssertionError as error:
            found.append(f"{name} {str(error).splitlines()[0]}")
    return found


def meanings() -> dict[str, Any]:
    """Ask every form and layout, forward and backward, with options that hide by different means."""
    lengths = {"kv_lengths": torch.tensor([41, 17]), "q_lengths": [31, 5], "q_offset": torch.tensor([3, 17])}
    segments = {"q_segment_ids": ids(48), "kv_segment_ids": ids(48)}
    prefix = {"causal": True, "prefix_lengths": [29, 3], "window": (None, 9)}
    decoding = {"causal": True, "q_offset": [38, 7], "kv_lengths": [41, 10]}
    empty = {"causal": True, "q_offset": 0, "kv_lengths": numpy.asarray([3, 0])}
    asked = {
        "ring zigzag": ("ring", "zigzag", (48, 48), {"causal": True, "softcap": 2.0}),
        "ring striped": ("ring", "striped", (32, 48), {"window": (11, 2), "q_offset": "lower_right"}),
        "ring contiguous": ("ring", "contiguous", (32, 48), {"causal": True, "window": (13, None)} | lengths),
        "ring lengths": ("ring", "striped", (32, 48), {"causal": True, "window": (13, None)} | lengths),
        "ring segments": ("ring", "striped", (48, 48), {"causal": True} | segments),
        "ring chunk": ("ring", "zigzag", (48, 48), {"causal": True, "chunk": 7, "kv_starts": [3, 11]}),
        "ring striped chunk": ("ring", "striped", (48, 48), {"chunk": 7, "kv_starts": [3, 11]} | segments),
        "ring prefix": ("ring", "striped", (48, 48), prefix),
        "ring empty": ("ring", "contiguous", (48, 48), empty),
        "ring plain": ("ring", "contiguous", (28, 20), {"scale": 0.3}),
        "all to all": ("all_to_all", "zigzag", (48, 48), {"causal": True} | segments),
        "all to all contiguous": ("all_to_all", "contiguous", (32, 48), {"window": (11, 2), "q_offset": "lower_right"}),
        "decoding striped": ("sharded_kv", "striped", (3, 48), decoding),
        "decoding zigzag": ("sharded_kv", "zigzag", (3, 48), decoding | {"chunk": 7}),
        "decoding contiguous": ("sharded_kv", "contiguous", (7, 48), {"causal": True, "q_offset": 9, "window": (8, 0)}),
        "decoding empty": ("sharded_kv", "contiguous", (3, 48), empty),
    }
    return {name: faults(*call) for name, call in asked.items()}
