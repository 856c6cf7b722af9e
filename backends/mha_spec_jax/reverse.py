"""Errors for unsupported derivatives, where those of JAX would name its internals."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NoReturn

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mha_spec.errors import ArgumentTypeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jax import Array

__all__ = ["differentiable_once", "reverse_only"]


def _refuse_forward(*_: object, refusal: str, **__: object) -> NoReturn:
    raise ArgumentTypeError(refusal)


_tangent = Primitive("mha_spec_tangent")
"""The identity on tangents: reverse mode transposes it, and forward mode, which evaluates it, raises."""
_tangent.def_impl(_refuse_forward)
_tangent.def_abstract_eval(lambda tangent, **_: tangent)
ad.deflinear2(_tangent, lambda cotangent, *_, **__: [cotangent])
batching.primitive_batchers[_tangent] = _refuse_forward
mlir.register_lowering(_tangent, _refuse_forward)

_reverse_only = Primitive("mha_spec_reverse_only")
"""The identity with `_tangent` as its derivative."""
_reverse_only.def_impl(lambda array, **_: array)
_reverse_only.def_abstract_eval(lambda array, **_: array)
ad.defjvp(_reverse_only, lambda tangent, *_, refusal: _tangent.bind(tangent, refusal=refusal))
batching.defvectorized(_reverse_only)
mlir.register_lowering(_reverse_only, lambda _, array, **__: [array])


def reverse_only(function: str, hessian: str) -> Callable[[Array], Array]:
    """Make an identity for the operands of a function that has reverse mode only; forward mode raises.

    Args:
        function: The name of the function.
        hessian: The sentence of the error about second derivatives.
    """
    refusal = (
        f"{function} of mha_spec_jax has no forward-mode derivative (jvp, jacfwd, linearize). "
        f"Use reverse mode: jax.grad, jax.vjp, jax.jacrev. {hessian}"
    )
    return partial(_reverse_only.bind, refusal=refusal)


def differentiable_once(refusal: str) -> Callable[[Array], Array]:
    """Make an identity for the arrays of a backward pass that cannot be differentiated again: it raises `refusal`."""

    @jax.custom_jvp
    def identity(array: Array) -> Array:
        return array

    @identity.defjvp
    def refuse(*_: object) -> NoReturn:
        raise ArgumentTypeError(refusal)

    return identity
