# /// script
# dependencies = ["mlx==0.32.4", "mlx-cpu==0.32.4"]
# ///
"""MLX's `mx.fast.scaled_dot_product_attention` on the CPU, unchanged.

Its mask is "causal", boolean or a bias, and its causal diagonal ends at the lower right. In 16 bits it keeps scores and
weights in 16 bits.
"""

from __future__ import annotations

import mlx.core as mx
import numpy

dtypes = ("float32",)
conventions = {"causal_alignment": "lower_right"}

mx.set_default_device(mx.cpu)


def supports(question):
    """Refuse the calls that the function does not have."""
    names = {name for name in ("mask", "bias") if name in question.arrays}
    names |= {"causal"} if question.options.get("causal") else set()
    if len(names) > 1:
        return "the mask is causal, boolean or a bias"
    others = (question.arrays[name].dtype.name for name in ("bias", "sinks") if name in question.arrays)
    return all(name == question.dtype for name in others) or "a bias and the sinks have the type of the query"


def attention(query, key, value, *, mask=None, bias=None, causal=False, scale=None, sinks=None):
    """Compute the output."""
    return numpy.array(call(*map(array, (query, key, value)), options_of(query, mask, bias, causal, scale, sinks)))


def attention_vjp(grad_output, query, key, value, *, mask=None, bias=None, causal=False, scale=None, sinks=None):
    """Return the gradients of mx.vjp."""
    options = options_of(query, mask, bias, causal, scale, sinks)
    names = [name for name, operand in (("mask", bias), ("sinks", sinks)) if operand is not None]

    def forward(query, key, value, *others):
        return call(query, key, value, options | dict(zip(names, others, strict=True)))

    operands = [*map(array, (query, key, value)), *(options[name] for name in names)]
    gradients = [numpy.array(gradient) for gradient in mx.vjp(forward, operands, [array(grad_output)])[1]]
    others = dict(zip(names, gradients[3:], strict=True))
    return (*gradients[:3], others.get("mask"), others.get("sinks"))


def array(operand):
    """Convert an operand to an array of MLX, which has no negative strides."""
    return mx.array(numpy.ascontiguousarray(operand))


def options_of(query, mask, bias, causal, scale, sinks):
    """Return the keywords of the call; the scale has no default."""
    pairs = bias if mask is None else mask
    return {
        "scale": query.shape[3] ** -0.5 if scale is None else scale,
        "mask": "causal" if causal else None if pairs is None else array(pairs),
        "sinks": None if sinks is None else array(sinks),
    }


def call(query, key, value, options):
    """Call the function."""
    return mx.fast.scaled_dot_product_attention(query, key, value, **options)
