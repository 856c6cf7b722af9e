"""Which path a call takes, and the one native kernel that has the asked meaning: cuDNN's, for half precision.

| path | taken where | forward | backward |
| --- | --- | --- | --- |
| cuDNN | NVIDIA GPUs, see (1) | `jax.nn.dot_product_attention` by cuDNN | its own, once |
| plain | no pair can be hidden | `forward.attend` | `backward.gradients` |
| few | at most `forward.FEW` scores | `forward.attend` of finite values, see (2) | `backward.gradients` |
| many | everything else | `forward.attend`, see (3) | `backward.gradients` |
| weights | attention_weights | `forward.softmax` of all pairs | that of its operations |

1. float16 or bfloat16, qk_dim = v_dim = 8, 16, ... 128, kv_len >= 1, no lse, no option but a positive scale, and causal
   where q_len = kv_len. A value that is not finite reaches the rows of its tile: the deviation nonfinite=reaches_tile.
2. Rows that see a value that is not finite are marked afterwards.
3. As it stands; where its output is not finite, again as (2). Under `vmap` both are worked.

The blocks of a call are those of `plan`: one for a small call, and for many scores as many as memory of O(length) asks.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mha_spec.arguments import OPTIONS

from .plan import are_known
from .reverse import once, reverse_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments

__all__ = ["answers", "attention"]

TAKEN = {"scale", "causal", "dropout_rate", "dropout_key"}
"""The options that cuDNN is given, and those that say nothing at a rate of 0."""
CAPABILITY = 8.0
"""The least compute capability of the kernel."""


def answers(a: Arguments) -> bool:
    """Whether cuDNN gives exactly the answer to this call."""
    if a.query.dtype not in (jnp.float16, jnp.bfloat16) or not has_kernel(a.query):
        return False
    if not are_known(a.batch, a.q_len, a.kv_len):
        return False
    size = a.query.shape[3]
    fits = size == a.value.shape[3] and size % 8 == 0 and size <= 128 and min(a.query.shape[:3]) > 0 < a.kv_len
    aligned = not a.causal or a.q_len == a.kv_len
    plain = a.dropout_rate == 0 and all(getattr(a, name) is None for name in OPTIONS if name not in TAKEN)
    return fits and aligned and plain and (a.scale is None or a.scale > 0)


def has_kernel(array: jax.Array) -> bool:
    """Whether cuDNN's kernel runs where an array lies; one that is traced lies where jax puts arrays."""
    devices = jax.devices()[:1] if isinstance(array, Tracer) else array.devices()
    return all(
        device.platform == "gpu"
        and "cuda" in device.client.platform_version
        and float(device.compute_capability) >= CAPABILITY
        for device in devices
    )


def attention(a: Arguments) -> jax.Array:
    """Ask cuDNN, whose axes are (batch, length, heads, size)."""
    return _attention((a.scale, a.causal), *map(reverse_only, (a.query, a.key, a.value)))


def _asked(options: tuple[float | None, bool], *operands: jax.Array) -> jax.Array:
    query, key, value = (jnp.swapaxes(one, 1, 2) for one in operands)
    scale, causal = options
    output = jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(output, 1, 2)


_attention = jax.custom_vjp(_asked, nondiff_argnums=(0,))


def _forward(options: tuple[float | None, bool], *operands: jax.Array) -> tuple[jax.Array, Callable]:
    return jax.vjp(partial(_asked, options), *operands)


def _backward(_: tuple[float | None, bool], pull: Callable, grad_output: jax.Array) -> tuple[jax.Array, ...]:
    return jax.tree.map(once, pull)(once(grad_output))


_attention.defvjp(_forward, _backward)
