"""A key that no row sees has gradients of 0, whatever is not finite in the rows that do not see it (MHA-POISON-1)."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from support.numbers import numbers

import mha_spec
from mha_spec_conformance.targets.conversion import to_library, to_numpy

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, QK_DIM, V_DIM = 2, 6, 3, 5, 11, 7, 13
SEEN = 5
"""No row sees a key from here on."""

OPTIONS: dict[str, dict[str, Any]] = {
    "kv_lengths": {"kv_lengths": [SEEN, 2]},
    "both lengths": {"kv_lengths": [SEEN, SEEN], "q_lengths": [2, 1]},
    "causal": {"causal": True, "q_offset": 0},
    "window": {"window": (1, 0), "q_offset": 0},
    "mask": {"mask": (numpy.arange(KV_LEN) < SEEN).reshape(1, 1, 1, KV_LEN)},
}
PLACES = dict.fromkeys(("query", "key", "value", "grad_output", "bias"), (0, 0, 0, 0))
PLACES |= {"sinks": (0,), "grad_lse": (0, 0, 0)}


def _arrays() -> dict[str, numpy.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "grad_output": (BATCH, HEADS, Q_LEN, V_DIM),
        "query": (BATCH, HEADS, Q_LEN, QK_DIM),
        "key": (BATCH, KV_HEADS, KV_LEN, QK_DIM),
        "value": (BATCH, KV_HEADS, KV_LEN, V_DIM),
        "bias": (1, HEADS, 1, 1),
        "sinks": (HEADS,),
        "grad_lse": (BATCH, HEADS, Q_LEN),
    }
    return {name: numbers(*shape, seed=seed).astype("float32") for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "tensorflow"])
def test_hidden_keys_have_gradients_of_0(backend: str, options: str) -> None:
    attention_vjp = mha_spec.backend(backend).attention_vjp
    plain = {
        name: to_library(value, backend) if isinstance(value, numpy.ndarray) else value
        for name, value in OPTIONS[options].items()
    }
    for name, place in PLACES.items():
        for number in (numpy.nan, numpy.inf, -numpy.inf):
            arrays = _arrays()
            arrays[name][place] = number
            gradients = attention_vjp(**{label: to_library(array, backend) for label, array in arrays.items()}, **plain)
            grad_key, grad_value = (to_numpy(gradient) for gradient in gradients[1:3])
            for entry, seen in enumerate(OPTIONS[options].get("kv_lengths", [SEEN, SEEN])):
                assert grad_key[entry, :, :seen].any(), (name, number)
                assert not grad_key[entry, :, seen:].any(), (name, number)
                assert not grad_value[entry, :, seen:].any(), (name, number)
