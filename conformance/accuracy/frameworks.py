"""Honest implementations: the attentions of PyTorch and JAX, and the formula of attention under the autodiff of each.

Two are left out, because the rule excludes them: PyTorch's CPU flash backward in 16 bits accumulates blocks in tensors
of 16 bits, which rounds once per block; jax.nn in float64 computes its softmax in float32.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from problems import Problem

    Arrays = dict[str, numpy.ndarray]

__all__ = ["FRAMEWORKS", "Framework"]

jax.config.update("jax_enable_x64", True)
torch.set_num_threads(1)


def to_torch(array: numpy.ndarray) -> torch.Tensor:
    """Convert an array to a tensor of the same dtype."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(numpy.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def from_torch(tensor: torch.Tensor) -> numpy.ndarray:
    """Convert a tensor to an array of the same dtype."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Framework:
    """An implementation of another project: the problems that it supports, its forward pass and its gradients."""

    name: str
    profile = "standard"

    def supports(self, problem: Problem) -> bool:
        """Return True if the implementation supports the problem."""
        raise NotImplementedError

    def forward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return the output, and lse if the implementation returns it."""
        raise NotImplementedError

    def backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return the gradients, or none if they are less precise than the rule assumes."""
        raise NotImplementedError


def _gradient(leaf: torch.Tensor) -> numpy.ndarray:
    return from_torch(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def every_row_sees(problem: Problem) -> bool:
    """Return True if no row is empty; frameworks differ on empty rows, which is not about accuracy."""
    return bool(problem.visible.any(axis=-1).all())


class TorchMath(Framework):
    """The unfused attention of PyTorch, with its autograd."""

    name = "torch SDPA math"
    profile = "strict"

    def supports(self, problem: Problem) -> bool:
        """Return True without soft cap, sinks and a cotangent of lse."""
        names = {*problem.arrays, *problem.options}
        return every_row_sees(problem) and not names & {"softcap", "sinks", "grad_lse"}

    def forward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return the output."""
        return {"output": from_torch(self._output(problem, self._leaves(problem)))}

    def backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return the gradients of query, key and value."""
        leaves = self._leaves(problem)
        for name in ("query", "key", "value"):
            leaves[name].requires_grad_()
        self._output(problem, leaves).backward(to_torch(problem.arrays["grad_output"]))
        return {f"grad_{name}": _gradient(leaves[name]) for name in ("query", "key", "value")}

    def _leaves(self, problem: Problem) -> dict[str, torch.Tensor]:
        return {name: to_torch(array) for name, array in problem.arrays.items()}

    def _output(self, problem: Problem, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.ops.aten._scaled_dot_product_attention_math(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            _float_mask(problem),
            problem.options.get("dropout_rate", 0.0),
            dropout_mask=leaves.get("dropout_mask"),
            scale=problem.scale,
            enable_gqa=problem.group > 1,
        )[0]


def _float_mask(problem: Problem) -> torch.Tensor | None:
    """Combine mask and bias into PyTorch's additive mask, in the query's dtype if there is no bias."""
    if problem.visible.all() and "bias" not in problem.arrays:
        return None
    bias = numpy.where(problem.visible, problem.working("bias") if "bias" in problem.arrays else 0, -numpy.inf)
    mask = torch.from_numpy(bias.astype(problem.work))
    return mask if "bias" in problem.arrays else mask.to(to_torch(problem.arrays["query"]).dtype)


class TorchFlash(TorchMath):
    """The fused CPU kernel of PyTorch with its lse, and its backward if that accumulates in the softmax's type."""

    name = "torch SDPA flash"
    profile = "standard"

    def supports(self, problem: Problem) -> bool:
        """Return True without dropout."""
        return super().supports(problem) and "dropout_mask" not in problem.arrays

    def forward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return output and lse."""
        output, lse = self._flash(problem, self._repeated(problem))
        return {"output": from_torch(output), "lse": from_torch(lse)}

    def backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return the gradients of query, key and value; none in 16 bits or for grouped heads."""
        if problem.dtype in ("float16", "bfloat16") or problem.group > 1:
            return {}
        tensors = self._repeated(problem)
        output, lse = self._flash(problem, tensors)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            to_torch(problem.arrays["grad_output"]),
            *tensors,
            output,
            lse,
            0.0,
            False,
            attn_mask=_float_mask(problem),
            scale=problem.scale,
        )
        return {f"grad_{name}": from_torch(x) for name, x in zip(("query", "key", "value"), gradients, strict=True)}

    def _repeated(self, problem: Problem) -> list[torch.Tensor]:
        repeats = {"query": 1, "key": problem.group, "value": problem.group}
        return [to_torch(problem.arrays[name]).repeat_interleave(n, dim=1) for name, n in repeats.items()]

    def _flash(self, problem: Problem, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, False, attn_mask=_float_mask(problem), scale=problem.scale
        )


class TorchFormula(TorchMath):
    """The formula with every option, in the softmax's type, under PyTorch's autograd."""

    name = "torch formula"
    profile = "strict"

    def supports(self, problem: Problem) -> bool:
        """Return True if no row is empty."""
        return every_row_sees(problem)

    def forward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return output and lse."""
        output, lse = self._output_and_lse(problem, self._leaves(problem))
        return {"output": from_torch(output), "lse": from_torch(lse)}

    def backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return every gradient."""
        leaves = self._leaves(problem)
        names = [name for name in ("query", "key", "value", "bias", "sinks") if name in leaves]
        for name in names:
            leaves[name].requires_grad_()
        output, lse = self._output_and_lse(problem, leaves)
        cotangents = [leaves["grad_output"], leaves.get("grad_lse", torch.zeros_like(lse))]
        torch.autograd.backward([output, lse], cotangents)
        return {f"grad_{name}": _gradient(leaves[name]) for name in names}

    def _output_and_lse(self, problem: Problem, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        work = torch.float64 if problem.dtype == "float64" else torch.float32
        key, value = (x[name].to(work).repeat_interleave(problem.group, dim=1) for name in ("key", "value"))
        logits = problem.scale * (x["query"].to(work) @ key.mT)
        if "softcap" in problem.options:
            logits = problem.options["softcap"] * torch.tanh(logits / problem.options["softcap"])
        if "bias" in x:
            logits = logits + x["bias"].to(work)
        logits = logits.masked_fill(~torch.from_numpy(problem.visible.copy()), -torch.inf)
        if "sinks" in x:
            sinks = x["sinks"].to(work).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]]
        if problem.kept is not None:
            weights = weights * torch.from_numpy(problem.kept)
        return (weights @ value).to(x["query"].dtype), torch.logsumexp(logits, dim=-1)


class JaxNN(Framework):
    """jax.nn.dot_product_attention by XLA; jitted except in float16, which XLA's CPU compiler does not support."""

    name = "jax.nn attention"

    def supports(self, problem: Problem) -> bool:
        """Return True for mask and bias alone, not in float64, at one pair of lengths, so that little is compiled."""
        extra = problem.options or problem.arrays.keys() & {"sinks", "grad_lse", "dropout_mask"}
        return (
            problem.dtype != "float64"
            and every_row_sees(problem)
            and not extra
            and problem.visible.shape[2:] == (67, 131)
        )

    def forward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return the output."""
        output = _jax_nn(problem.dtype != "float16", False)(*self._operands(problem), None)
        return {"output": numpy.asarray(output).swapaxes(1, 2)}

    def backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return the gradients of query, key and value, by JAX's autodiff."""
        gradient = jnp.asarray(problem.arrays["grad_output"].swapaxes(1, 2))
        gradients = _jax_nn(problem.dtype != "float16", True)(*self._operands(problem), gradient)
        names = ("grad_query", "grad_key", "grad_value")
        return {name: numpy.asarray(x).swapaxes(1, 2) for name, x in zip(names, gradients, strict=True)}

    def _operands(self, problem: Problem) -> tuple[list[jax.Array], jax.Array, numpy.ndarray, float]:
        tensors = [jnp.asarray(problem.arrays[name].swapaxes(1, 2)) for name in ("query", "key", "value")]
        bias = problem.arrays.get("bias", numpy.zeros(1, problem.work))
        return tensors, jnp.asarray(numpy.broadcast_to(bias, problem.visible.shape)), problem.visible, problem.scale


@cache
def _jax_nn(compiled: bool, gradients: bool) -> Callable[..., Any]:
    def call(tensors: list[jax.Array], bias: jax.Array, visible: jax.Array, scale: float, gradient: jax.Array) -> Any:
        def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(query, key, value, bias, visible, scale=scale, implementation="xla")

        return jax.vjp(forward, *tensors)[1](gradient) if gradients else forward(*tensors)

    return jax.jit(call, static_argnums=3) if compiled else call


class JaxFormula(Framework):
    """The formula with every option, in the softmax's type, jitted, under JAX's autodiff."""

    name = "jax formula, jit"
    profile = "strict"

    def supports(self, problem: Problem) -> bool:
        """Return True for one pair of lengths and two shapes of bias, so that little is compiled."""
        bias = problem.arrays.get("bias")
        return (
            every_row_sees(problem) and problem.visible.shape[2:] == (7, 131) and (bias is None or bias.shape[2] == 7)
        )

    def forward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return output and lse."""
        output, lse = _compiled(False)(*self._operands(problem))
        return {"output": numpy.asarray(output), "lse": numpy.asarray(lse)}

    def backward(self, problem: Problem) -> dict[str, numpy.ndarray]:
        """Return every gradient."""
        gradients = _compiled(True)(*self._operands(problem))
        return {f"grad_{name}": numpy.asarray(x) for name, x in gradients.items() if name in problem.arrays}

    def _operands(self, problem: Problem) -> tuple[Arrays, Arrays, tuple[numpy.ndarray, ...]]:
        """Return differentiated, other and cotangent arrays; absent ones are neutral, so that little is compiled."""
        arrays, work = problem.arrays, problem.work
        shape = problem.visible.shape
        leaves = {name: arrays[name] for name in ("query", "key", "value")}
        leaves["bias"] = arrays.get("bias", numpy.zeros((1, 1, 1, 1), work))
        if "sinks" in arrays:
            leaves["sinks"] = arrays["sinks"]
        kept = numpy.ones(shape, work) if problem.kept is None else problem.kept
        fixed = {"visible": problem.visible, "kept": kept, "scale": work(problem.scale)}
        if "softcap" in problem.options:
            fixed["softcap"] = work(problem.options["softcap"])
        return leaves, fixed, (arrays["grad_output"], arrays.get("grad_lse", numpy.zeros(shape[:3], work)))


@cache
def _compiled(gradients: bool) -> Callable[..., Any]:
    def output_and_lse(leaves: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        work = fixed["kept"].dtype
        group = leaves["query"].shape[1] // leaves["key"].shape[1]
        key, value = (jnp.repeat(leaves[name].astype(work), group, axis=1) for name in ("key", "value"))
        logits = fixed["scale"] * (leaves["query"].astype(work) @ key.mT)
        if "softcap" in fixed:
            logits = fixed["softcap"] * jnp.tanh(logits / fixed["softcap"])
        logits = jnp.where(fixed["visible"], logits + leaves["bias"].astype(work), -jnp.inf)
        if "sinks" in leaves:
            sinks = leaves["sinks"].astype(work).reshape(1, -1, 1, 1)
            logits = jnp.concatenate([logits, jnp.broadcast_to(sinks, (*logits.shape[:3], 1))], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., : key.shape[2]] * fixed["kept"]
        return (weights @ value).astype(leaves["query"].dtype), jax.nn.logsumexp(logits, axis=-1)

    def vjp(leaves: dict[str, jax.Array], fixed: dict[str, jax.Array], cotangents: tuple[jax.Array, ...]) -> Any:
        _, pull = jax.vjp(lambda differentiated: output_and_lse(differentiated, fixed), leaves)
        return pull(tuple(cotangents))[0]

    return jax.jit(vjp if gradients else lambda leaves, fixed, cotangents: output_and_lse(leaves, fixed))


FRAMEWORKS: tuple[Framework, ...] = (TorchMath(), TorchFlash(), TorchFormula(), JaxNN(), JaxFormula())
