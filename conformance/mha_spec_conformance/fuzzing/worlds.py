"""The worlds of our frameworks: the transformations under which a user calls a backend.

A world takes the functions of a backend by name and returns them transformed by `torch.compile`, `jax.jit`
and their like, without those that the world does not have.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec.arrays import dtype_name, library_of
from mha_spec.errors import MhaSpecError
from mha_spec.varlen_arguments import VARLEN_FUNCTIONS
from mha_spec_conformance.targets.loading import Target, load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Functions = dict[str, Callable[..., Any]]

__all__ = ["WORLDS", "UnknownWorld", "World", "load_in_world", "world_of"]

NOT_TRACED = ("alibi_slopes", "alibi_bias")
"""The functions whose operands are Python numbers."""


class UnknownWorld(MhaSpecError):
    """A target has no world of that name."""


@dataclass(frozen=True)
class World:
    """A transformation of functions, the number of calls that share a compilation, and whether their numbers differ."""

    enter: Callable[[Functions], Functions]
    reuse: int = 1
    numbers: bool = False


def load_in_world(name: str, world: str) -> Target:
    """Load a target whose functions are called in a world."""
    target = load(name)
    functions = world_of(name, world).enter(dict(target.functions))
    keywords = {role: words for role, words in target.claims.keywords.items() if role in functions}
    return replace(target, functions=functions, claims=replace(target.claims, keywords=keywords))


def world_of(name: str, world: str) -> World:
    """Return a world of a target by its name.

    Raises:
        UnknownWorld: The target has no such world; the message names those that it has.
    """
    if world not in WORLDS.get(name, {}):
        known = ", ".join(f"{target} {label}" for target, worlds in WORLDS.items() for label in worlds)
        raise UnknownWorld(f"--world {world}: target {name} has no such world; there are {known}")
    return WORLDS[name][world]


def _is_traced(value: object) -> bool:
    """Tell whether an argument is an array of a framework, or a cache of such arrays."""
    members = value if isinstance(value, tuple) else (value,)
    return any(library_of(member) not in (None, "numpy") for member in members)


def over_arrays(functions: Functions, transform: Callable[..., Any], *, with_numbers: bool = False) -> Functions:
    """Transform each function as a function of its arrays, once for each choice of the other arguments.

    `transform` receives a function of the operands and of a dictionary of options. `with_numbers` leaves the Python
    values among the options to the transformation.
    """
    transformed: dict[bytes, Any] = {}

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any, **options: Any) -> Any:
            arrays = {word: value for word, value in options.items() if with_numbers or _is_traced(value)}
            fixed = {word: value for word, value in options.items() if word not in arrays}
            key = pickle.dumps((name, sorted(fixed.items()), sorted(arrays)))
            if key not in transformed:
                transformed[key] = transform(lambda operands, arrays: function(*operands, **arrays, **fixed))
            return transformed[key](operands, arrays)

        return call

    return {name: wrapped(name, function) for name, function in functions.items() if name not in NOT_TRACED}


def over_batch(functions: Functions, transform: Callable[..., Any]) -> Functions:
    """Call attention for each batch entry, all in a single transformed call; `transform` maps over the first axis."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any, **options: Any) -> Any:
            batch = operands[0].shape[0]
            if batch == 0 or any(isinstance(value, (list, numpy.ndarray)) for value in options.values()):
                raise NotImplementedError("an empty batch, or host data, which cannot be mapped over")
            mapped = {
                n: x[:, None] for n, x in options.items() if n != "sinks" and _is_traced(x) and x.shape[:1] == (batch,)
            }
            fixed = {name: value for name, value in options.items() if name not in mapped}
            entry = transform(lambda operands, mapped: function(*operands, **mapped, **fixed))
            outputs = entry(tuple(x[:, None] for x in operands), mapped)
            return tuple(x[:, 0] for x in outputs) if isinstance(outputs, tuple) else outputs[:, 0]

        return call

    return {name: wrapped(functions[name]) for name in ("attention", "attention_weights")}


def by_autodiff(functions: Functions, vjp: Callable[..., Any], zeros_like: Callable[..., Any]) -> Functions:
    """Answer attention_vjp with the gradients of attention that the framework takes.

    `vjp` receives a function of a dictionary of arrays, the dictionary, and a function that makes the cotangents from
    the outputs; it returns a dictionary of gradients.
    """

    def attention_vjp(grad_output: Any, query: Any, key: Any, value: Any, **options: Any) -> Any:
        if dtype_name(grad_output) != dtype_name(query):
            raise NotImplementedError("a cotangent of another dtype than the output")
        arrays = {"query": query, "key": key, "value": value}
        arrays |= {name: options.pop(name) for name in ("bias", "sinks") if options.get(name) is not None}
        grad_lse = options.pop("grad_lse", None)

        def cotangents(output: Any, lse: Any) -> tuple[Any, Any]:
            if grad_lse is not None and dtype_name(grad_lse) != dtype_name(lse):
                raise NotImplementedError("a cotangent of another dtype than lse")
            return grad_output, zeros_like(lse) if grad_lse is None else grad_lse

        gradients = vjp(lambda arrays: functions["attention"](**arrays, **options, return_lse=True), arrays, cotangents)
        return tuple(gradients.get(name) for name in ("query", "key", "value", "bias", "sinks"))

    return {"attention_vjp": attention_vjp}


def torch_compile(functions: Functions, *, dynamic: bool) -> Functions:
    """Compile with `torch.compile`, for fixed sizes or for sizes and numbers that change."""
    import torch

    def transform(call: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(call, dynamic=dynamic)

    return over_arrays(functions, transform, with_numbers=True)


def torch_vmap(functions: Functions) -> Functions:
    """Map over the batch with `torch.vmap`."""
    import torch

    return over_batch(functions, torch.vmap)


def torch_func_grad(functions: Functions) -> Functions:
    """Differentiate with `torch.func.vjp`."""
    import torch

    def vjp(call: Any, arrays: Any, cotangents: Any) -> Any:
        outputs, pull = torch.func.vjp(call, arrays)[:2]
        return pull(cotangents(*outputs))[0]

    return by_autodiff(functions, vjp, torch.zeros_like)


def jax_jit(functions: Functions) -> Functions:
    """Compile with `jax.jit`."""
    import jax

    return over_arrays(functions, jax.jit)


def jax_vmap(functions: Functions) -> Functions:
    """Map over the batch with `jax.vmap`."""
    import jax

    return over_batch(functions, jax.vmap)


def jax_grad(functions: Functions) -> Functions:
    """Differentiate with `jax.vjp`."""
    import jax

    def vjp(call: Any, arrays: Any, cotangents: Any) -> Any:
        outputs, pull = jax.vjp(call, arrays)
        return pull(cotangents(*outputs))[0]

    return by_autodiff(functions, vjp, jax.numpy.zeros_like)


def without_packed(functions: Functions) -> Functions:
    """Leave out packed calls, which need lengths on the host under XLA, and the numbers of heads in every graph."""
    return {name: function for name, function in functions.items() if name not in VARLEN_FUNCTIONS}


def tensorflow_xla(functions: Functions) -> Functions:
    """Compile with XLA, for the sizes of each call."""
    return tensorflow_function(without_packed(functions), jit_compile=True)


def tensorflow_function(functions: Functions, **options: Any) -> Functions:
    """Trace with `tf.function`, for the sizes of each call."""
    import tensorflow

    return over_arrays(functions, lambda call: tensorflow.function(call, **options))


KNOWN_AXES = {4: (1, 3), 3: (2,)}
"""The axes, by rank, that hold heads and sizes: the backend asks that these are known when a call is traced."""

KNOWN_AXES_OF_PACKED = {4: (2, 3), 3: (1, 2)}
"""The same axes of the arrays of packed and paged calls."""


def tensorflow_unknown(functions: Functions) -> Functions:
    """Trace with `tf.function` once for all batches and lengths, which stay unknown."""
    packed = {name: function for name, function in functions.items() if name in VARLEN_FUNCTIONS}
    return tensorflow_open(without_packed(functions), KNOWN_AXES) | tensorflow_open(packed, KNOWN_AXES_OF_PACKED)


def tensorflow_open(functions: Functions, known: Mapping[int, tuple[int, ...]]) -> Functions:
    """Trace with `tf.function` for arrays of which only these axes, by rank, are known."""
    import tensorflow as tf

    def specified(value: Any) -> Any:
        axes = known.get(len(value.shape), ())
        return tf.TensorSpec([size if axis in axes else None for axis, size in enumerate(value.shape)], value.dtype)

    def signature_of(value: Any) -> Any:
        """Describe an argument; the parameters of a layer, a mapping, have no batch and no length."""
        describe = tf.TensorSpec.from_tensor if isinstance(value, dict) else specified
        return tf.nest.map_structure(describe, value)

    def transform(call: Any) -> Any:
        traced: dict[str, Any] = {}

        def run(operands: Any, arrays: Any) -> Any:
            # None, the cumulative lengths that a paged call need not have, is not described.
            present = {index: operand for index, operand in enumerate(operands) if operand is not None}

            def call_with(present: Any, arrays: Any) -> Any:
                return call([present.get(index) for index in range(len(operands))], arrays)

            signature = tuple({name: signature_of(x) for name, x in group.items()} for group in (present, arrays))
            if repr(signature) not in traced:
                traced[repr(signature)] = tf.function(call_with, input_signature=signature)
            return traced[repr(signature)](present, arrays)

        return run

    return over_arrays(functions, transform)


def tensorflow_tape(functions: Functions) -> Functions:
    """Differentiate with `tf.GradientTape`."""
    import tensorflow as tf

    def vjp(call: Any, arrays: Any, cotangents: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(arrays)
            outputs = call(arrays)
        return tape.gradient(outputs, arrays, cotangents(*outputs), tf.UnconnectedGradients.ZERO)

    return by_autodiff(functions, vjp, tf.zeros_like)


WORLDS: dict[str, dict[str, World]] = {
    "torch": {
        "compile": World(lambda functions: torch_compile(functions, dynamic=False), reuse=4),
        "compile-dynamic": World(lambda functions: torch_compile(functions, dynamic=True), reuse=8, numbers=True),
        "func-grad": World(torch_func_grad),
        "vmap": World(torch_vmap),
    },
    "jax": {
        "jit": World(jax_jit, reuse=8),
        "vmap": World(jax_vmap),
        "grad": World(jax_grad),
    },
    "tensorflow": {
        "function": World(tensorflow_function, reuse=8),
        "function-unknown": World(tensorflow_unknown, reuse=8),
        "xla": World(tensorflow_xla, reuse=8),
        "tape": World(tensorflow_tape),
    },
}
"""The worlds of each registered backend by name."""
