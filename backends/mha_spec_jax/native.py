"""The path of each call, and calls of cuDNN, the only native kernel with the specified meaning.

| path | condition | forward | backward |
| --- | --- | --- | --- |
| cuDNN | NVIDIA GPUs, see (1) | `jax.nn.dot_product_attention` by cuDNN | its derivative, once |
| plain | no constraint can hide a pair | `forward.attend` | `backward.gradients` |
| few | at most `forward.FEW` scores | `forward.attend` of finite values, see (2) | `backward.gradients` |
| many | everything else | `forward.attend`, see (3) | `backward.gradients` |
| weights | attention_weights | `forward.softmax` of all pairs | the derivative of its operations |

1. float16 or bfloat16, qk_dim = v_dim = 8, 16, ... 128, kv_len >= 1, no lse, no option but a positive scale, and causal
   where q_len = kv_len. A non-finite value reaches the rows of its tile: the deviation nonfinite=reaches_tile.
2. Rows that see a non-finite value are set to NaN afterwards.
3. First with the values unchanged; if the output is not finite, again as in (2). `vmap` computes both.

`plan` cuts a call into blocks: a small call is a single block, and large calls use memory of O(length).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.core import Tracer

from mha_spec.arguments import OPTIONS

from .plan import are_known
from .reverse import differentiable_once, reverse_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from mha_spec.arguments import Arguments

__all__ = ["attention", "supports"]

SUPPORTED = {"scale", "causal", "dropout_rate", "dropout_key"}
"""The options that cuDNN takes, and those that have no effect at a rate of 0."""
CAPABILITY = 8.0
"""The least compute capability of the kernel."""


def supports(a: Arguments) -> bool:
    """Tell whether cuDNN computes this call as specified."""
    if a.query.dtype not in (jnp.float16, jnp.bfloat16) or not has_kernel(a.query):
        return False
    if not are_known(a.batch, a.q_len, a.kv_len):
        return False
    size = a.query.shape[3]
    fits = size == a.value.shape[3] and size % 8 == 0 and size <= 128 and min(a.query.shape[:3]) > 0 < a.kv_len
    aligned = not a.causal or a.q_len == a.kv_len
    plain = a.dropout_rate == 0 and all(getattr(a, name) is None for name in OPTIONS if name not in SUPPORTED)
    return fits and aligned and plain and (a.scale is None or a.scale > 0)


def has_kernel(array: jax.Array) -> bool:
    """Tell whether cuDNN's kernel runs on the devices of an array; a traced array counts as on the default device."""
    devices = jax.devices()[:1] if isinstance(array, Tracer) else array.devices()
    return all(
        device.platform == "gpu"
        and "cuda" in device.client.platform_version
        and float(device.compute_capability) >= CAPABILITY
        for device in devices
    )


def attention(a: Arguments) -> jax.Array:
    """Compute attention by cuDNN."""
    return _attention((a.scale, a.causal), *map(_in_reverse, (a.query, a.key, a.value)))


def _call_cudnn(options: tuple[float | None, bool], *operands: jax.Array) -> jax.Array:
    query, key, value = (jnp.swapaxes(operand, 1, 2) for operand in operands)  # cuDNN has (batch, length, heads, size).
    scale, causal = options
    output = jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=causal, implementation="cudnn")
    return jnp.swapaxes(output, 1, 2)


_attention = jax.custom_vjp(_call_cudnn, nondiff_argnums=(0,))


def _forward(options: tuple[float | None, bool], *operands: jax.Array) -> tuple[jax.Array, Callable]:
    return jax.vjp(partial(_call_cudnn, options), *operands)


_SECOND = "attention of mha_spec_jax by cuDNN has no second derivatives. Use return_lse=True, whose kernel has them."
_in_reverse, _once = reverse_only("attention", _SECOND), differentiable_once(_SECOND)


def _backward(_: tuple[float | None, bool], pull: Callable, grad_output: jax.Array) -> tuple[jax.Array, ...]:
    return jax.tree.map(_once, pull)(_once(grad_output))


_attention.defvjp(_forward, _backward)
