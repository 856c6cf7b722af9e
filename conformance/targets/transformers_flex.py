# /// script
# dependencies = ["torch==2.13.0", "transformers==5.24.0"]
# ///
"""Transformers' `flex_attention_forward`, unchanged, without `torch.compile`, with the masks of `flex_attention_mask`.

`mask` is part of its mask function, and so has no axis of heads; a bias is its `position_bias`. On the CPU it has
neither gradients nor sinks. Compiled for the CPU, a bias is the `score_mod` of docs/findings/torch_flex_heap.py.
"""

from __future__ import annotations

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import warnings
from types import SimpleNamespace

import transformers_eager
from transformers import masking_utils
from transformers.integrations.flex_attention import flex_attention_forward

arrays = "torch"
dtypes = ("float64", "float32", "float16", "bfloat16")
conventions = {"causal_alignment": "upper_left"}
features = ("mask", "bias", "causal", "window", "offset", "kv_lengths", "segments", "scale", "softcap")

MODULE = SimpleNamespace(training=False)

warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")


def supports(question):
    """Refuse the masks for which Transformers has no function."""
    if "mask" in question.arrays and question.arrays["mask"].shape[1] != 1:
        return "a mask function is called for the first head alone"
    return transformers_eager.supports(question)


def attention(query, key, value, *, mask=None, bias=None, scale=None, softcap=None, **structure):
    """Make the block mask and call the function."""
    pairs = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    block_mask = None
    if structure or mask is not None:
        block_mask = make_block_mask(query, key, mask, **structure)
    if bias is not None:
        bias = bias.expand(pairs)
    output, _ = flex_attention_forward(
        MODULE, query, key, value, block_mask, scaling=scale, softcap=softcap, position_bias=bias
    )
    return output.transpose(1, 2)


def make_block_mask(query, key, mask, **structure):
    """Make a block mask whose function also reads `mask`; it is called with positions, to which an offset is added."""
    arguments = transformers_eager.mask_arguments(query, key, **structure)
    if mask is not None:
        first, mask = arguments["q_offset"], mask.expand(query.shape[0], 1, query.shape[2], key.shape[2])
        arguments["mask_function"] = masking_utils.and_masks(
            arguments["mask_function"], lambda b, h, i, j: mask[b, 0, i - first, j]
        )
    return masking_utils.flex_attention_mask(**arguments)
