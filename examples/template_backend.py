"""A complete backend of a third party: a kernel, and the specification's functions around it.

Copy this file, put your kernel into it, and declare it in your pyproject.toml under the name of your array library:

    [project.entry-points."mha_spec.backends"]
    mylibrary = "mylibrary_mha"

Then `mha_spec.attention` answers with it for arrays of that library, and `mha-spec check mylibrary` judges it.
"""

from __future__ import annotations

import numpy

from mha_spec import reference
from mha_spec.arguments import Arguments, expand_options
from mha_spec.checks import check, check_flag, refuse_unknown
from mha_spec.layer import Layer
from mha_spec.layer_steps import LayerSteps
from mha_spec.steps import sum_over_visible

KERNEL_OPTIONS = {"mask", "scale"}
"""The options that the kernel takes; a call with any other option is answered by the reference."""


@expand_options
@numpy.errstate(all="ignore")
def attention(query, key, value, *, return_lse=False, **options):
    """Attention by the kernel where it takes every option of the call; see `mha_spec.reference.attention`."""
    refuse_unknown(options, "attention")
    if not options.keys() <= KERNEL_OPTIONS:
        return reference.attention(query, key, value, return_lse=return_lse, **options)
    # Validating here, by the shared checks, is what makes every backend refuse the same calls in the same words.
    arguments = check(Arguments(query, key, value, function="attention", **options))
    output, lse = kernel(query, key, value, arguments.mask, arguments.scale)
    return (output, lse) if check_flag("return_lse", return_lse) else output


def kernel(query, key, value, mask, scale):
    """Return output and lse; replace this function by a call of your kernel."""
    softmax_type = numpy.float64 if query.dtype == numpy.float64 else numpy.float32
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.astype(softmax_type) for x in (query, key.repeat(group, axis=1), value.repeat(group, axis=1)))
    scores = q @ k.swapaxes(2, 3) * softmax_type(query.shape[3] ** -0.5 if scale is None else scale)
    visible = numpy.broadcast_to(True if mask is None else mask, scores.shape)
    scores = numpy.where(visible, scores, -numpy.inf)
    largest = scores.max(axis=3, keepdims=True, initial=-numpy.inf)
    anchor = numpy.where(largest == -numpy.inf, 0, largest)  # a row that sees no key has no maximum
    powers = numpy.exp(scores - anchor)
    total = powers.sum(axis=3, keepdims=True)
    weights = powers / numpy.where(total == 0, 1, total)
    output = sum_over_visible(weights, v, visible)  # in a plain product, 0 * NaN would let a hidden NaN through
    return output.astype(query.dtype), (anchor + numpy.log(total))[..., 0]


attention_weights = reference.attention_weights
attention_vjp = reference.attention_vjp
merge_attention = reference.merge_attention
merge_attention_vjp = reference.merge_attention_vjp
rotary_embedding = reference.rotary_embedding
alibi_slopes = reference.alibi_slopes
alibi_bias = reference.alibi_bias

_LAYER = Layer(LayerSteps(attend=attention, weigh=attention_weights))
multi_head_attention = _LAYER.multi_head_attention
multi_head_attention_weights = _LAYER.multi_head_attention_weights
multi_head_attention_and_weights = _LAYER.multi_head_attention_and_weights
