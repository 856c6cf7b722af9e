"""mha_spec_jax refuses values that are not floating arrays of JAX, and arrays on different devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy
import pytest
from jax.experimental import sparse
from support.jax_world import operands, tokens

import mha_spec_jax
from mha_spec.errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [1.0],
        numpy.ones((2, 6, 5, 11), "float32"),
        jax.ShapeDtypeStruct((2, 6, 5, 11), jnp.float32),
        jax.random.split(jax.random.key(0), (2, 6, 5, 11)),
        jnp.ones((2, 6, 5, 11), jnp.int32),
        jnp.ones((2, 6, 5, 11), jnp.complex64),
    ],
    ids=lambda wrong: f"{type(wrong).__name__} {getattr(wrong, 'dtype', '')}",
)
@pytest.mark.parametrize("place", range(3))
def test_values_that_are_not_floating_arrays_of_jax_are_refused(wrong: Any, place: int) -> None:
    arguments: list[Any] = operands(5, 5, "float32")
    arguments[place] = wrong
    with pytest.raises(ArgumentTypeError):
        mha_spec_jax.attention(*arguments)


def test_sparse_arrays_are_refused() -> None:
    query, key, value = operands(5, 5, "float32")
    for index in range(3):
        arguments: list[Any] = [query, key, value]
        arguments[index] = sparse.BCOO.fromdense(arguments[index])
        with pytest.raises(ArgumentTypeError, match="must be"):
            mha_spec_jax.attention(*arguments)
    with pytest.raises(ArgumentTypeError, match="`bias`"):
        mha_spec_jax.attention(query, key, value, bias=sparse.BCOO.fromdense(jnp.ones((1, 1, 5, 5))))


@pytest.mark.parametrize(
    "lengths", [{"kv_lengths": [10**400, 2]}, {"kv_lengths": ["a", 2]}, {"q_lengths": [2.5, 1]}], ids=str
)
def test_a_layer_checks_lengths_before_it_rotates_by_them(lengths: Any) -> None:
    layer = mha_spec_jax.MultiHeadAttention(12, 3, key=jax.random.key(0), rotary={})
    x = tokens(5, 12).astype("float32")
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=f"`{next(iter(lengths))}` must"):
        layer(x, causal=True, q_offset="lower_right", **lengths)


DEVICES = """
import jax, jax.numpy as jnp, numpy
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import mha_spec_jax as J
devices = jax.devices()
mesh, grid = Mesh(numpy.array(devices), "b"), Mesh(numpy.array(devices).reshape(2, 2), ("x", "y"))
put = lambda x, *axes, mesh=mesh: jax.device_put(x, NamedSharding(mesh, P(*axes)))
q, bias = jax.random.normal(jax.random.key(0), (4, 2, 3, 8)), jnp.ones((1, 2, 3, 3)).at[:, 1].set(0.5)
lengths = jnp.asarray([1, 2, 3, 0])
layer = J.MultiHeadAttention(8, 2, key=jax.random.key(1), rotary={}, qk_norm=True)
x = q[:, 0]
cache = lambda layer: layer.empty_cache(4, 7)
"""

TOGETHER = """
near = lambda actual, wanted: numpy.testing.assert_allclose(*map(numpy.asarray, (actual, wanted)), rtol=1e-5, atol=1e-6)
plain = J.attention(q, q, q, bias=bias, kv_lengths=[1, 2, 3, 0])
near(J.attention(put(q, "b"), put(q), q, bias=put(bias), kv_lengths=put(lengths, "b")), plain)
near(J.attention(put(q, "b"), put(q, "b", None), put(q, None), bias=bias, kv_lengths=put(lengths)), plain)
near(J.attention(put(q, "b"), put(q, "x", "y", mesh=grid), q, bias=bias, kv_lengths=[1, 2, 3, 0]), plain)
spread = jax.tree.map(put, layer)
near(spread(put(x, "b"), cache=cache(spread), causal=True)[0], layer(x, causal=True))
near(layer(put(x, "b"), cache=cache(layer), causal=True)[0], layer(x, causal=True))
lone = jax.device_put(layer, devices[1])
near(lone(x, cache=cache(lone), causal=True, kv_lengths=jnp.full(4, 3, device=devices[1]))[0], layer(x, causal=True))
"""

APART = """
from mha_spec.errors import ArgumentValueError
lone = jax.device_put(layer, devices[1])
def refused(call):
    try:
        call()
    except ArgumentValueError as error:
        assert "MHA-ARG-4" in str(error), error
    else:
        raise AssertionError
for other in (jax.device_put(q, devices[1]), put(q, "b", mesh=Mesh(numpy.array(devices[::-1]), "b"))):
    refused(lambda: J.attention(put(q, "b"), other, q))
    refused(lambda: J.attention_vjp(other, put(q, "b"), q, q))
    refused(lambda: J.attention(q, put(q, "b"), other))
    refused(lambda: J.attention(q, other, q, mask=put(bias > 0)))
    refused(lambda: J.merge_attention(put(q, "b"), q[..., 0], other, q[..., 0]))
    refused(lambda: J.merge_attention(q, put(q[..., 0], "b"), other, q[..., 0]))
half = q[..., :4]
away = [jax.device_put(lengths, device) for device in devices]
names = [*layer.params]
for pair in zip(names, names[1:] + names[:1]):
    params = {name: jax.device_put(layer.params[name], device) for name, device in zip(pair, devices)}
    refused(lambda: layer.replace(**params)(x))
    refused(lambda: layer.replace(**params).attention_weights(x))
refused(lambda: lone(x, cache=cache(layer)._replace(lengths=away[2])))
refused(lambda: lone(x, q_offset=away[2]))
refused(lambda: J.append_cache(jax.device_put(cache(layer), devices[1]), half, half, away[2]))
refused(lambda: J.append_cache(cache(layer)._replace(lengths=away[1]), half, half, away[2]))
refused(lambda: J.rotary_embedding(jax.device_put(q, devices[2]), jnp.arange(3, device=devices[1])))
places, rates = ([jax.device_put(array, device) for device in devices] for array in (jnp.arange(3), jnp.ones(4)))
for vectors, where in ((q, places[1]), (jax.device_put(q, devices[1]), [0, 1, 2])):
    refused(lambda: J.rotary_embedding(vectors, where, frequencies=rates[2]))
rotary = {"frequencies": rates[2][:2]}
refused(lambda: J.multi_head_attention(x, x, x, lone.params, rotary=rotary))
refused(lambda: J.multi_head_attention(x, x, x, layer.params, rotary=rotary, positions=places[1]))
refused(lambda: J.alibi_bias(jax.device_put(jnp.ones(2), devices[2]), 3, 3, q_offset=away[1]))
"""


@pytest.mark.parametrize("script", [TOGETHER, APART], ids=["the same devices", "other devices"])
def test_arrays_on_the_same_devices_go_together_and_others_are_refused(python: Callable[..., Any], script: str) -> None:
    done = python(DEVICES + script)
    assert done.returncode == 0, done.stderr
