"""The calls of JAX that gpu.py measures: ours, and jax.nn.dot_product_attention by cuDNN and by XLA, under jit."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

import mha_spec_jax

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_settings import Setting

__all__ = ["calls", "name_of", "present", "wait"]

_attention: Callable[..., Any] = mha_spec_jax.attention


def present(device: str) -> bool:
    """Return True if the installed jaxlib has such a device."""
    try:
        return bool(jax.devices(_platform(device)))
    except RuntimeError:
        return False


def name_of(device: str) -> str:
    """Name the device and the version."""
    return f"{jax.devices(_platform(device))[0].device_kind}, jax {jax.__version__}"


def wait(_: str, result: object) -> None:
    """Wait until the device has computed the result."""
    jax.block_until_ready(result)


def calls(setting: Setting, device: str, *, backward: bool) -> dict[str, Callable[[], object]]:
    """Make our call and those of jax.nn, some of which may raise."""
    place = jax.devices(_platform(device))[0]
    dtype = jnp.float32 if device == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(7), 3)
    operands = [
        jax.device_put(jax.random.normal(key, shape, dtype), place)
        for key, shape in zip(keys, setting.shapes, strict=True)
    ]
    options = setting.options(partial(jax.device_put, device=place))
    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    static = {name: value for name, value in options.items() if name not in arrays}
    visible = None if setting.visible is None or setting.causal else jax.device_put(setting.visible, place)
    theirs = {
        implementation: partial(_native, implementation=implementation, causal=setting.causal)
        for implementation in ("xla",) + (("cudnn",) if device != "cpu" else ())
    }
    functions: dict[str, Callable[[], object]] = {
        "ours": partial(_compiled(partial(_attention, **static), backward=backward), *operands, **arrays)
    }
    for name, call in theirs.items():
        functions[f"jax {name}"] = partial(_compiled(call, backward=backward), *operands, visible=visible)
    return functions


def _platform(device: str) -> str:
    return "cpu" if device == "cpu" else "gpu"


def _native(query: Any, key: Any, value: Any, *, visible: Any, implementation: Any, causal: bool) -> Any:
    """Call jax.nn with its order of axes, and with a full mask, which cuDNN requires."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    if visible is not None:
        visible = jnp.broadcast_to(visible, (*visible.shape[:2], query.shape[1], key.shape[1]))
    output = jax.nn.dot_product_attention(
        query, key, value, mask=visible, is_causal=causal, implementation=implementation
    )
    return jnp.swapaxes(output, 1, 2)


def _compiled(call: Callable[..., Any], *, backward: bool) -> Callable[..., Any]:
    if not backward:
        return jax.jit(call)

    def passes(query: Any, key: Any, value: Any, **arrays: Any) -> Any:
        output, pull = jax.vjp(lambda *operands: call(*operands, **arrays), query, key, value)
        return pull(output)

    return jax.jit(passes)
