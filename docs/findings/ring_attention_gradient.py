# /// script
# dependencies = ["beartype==0.23.1", "einops==0.8.2", "ring-attention-pytorch==0.5.20", "torch==2.13.0"]
# ///
"""ring-attention-pytorch: with fewer queries than keys, the gradient of a causal `ring_flash_attn` has another mask.

The forward pass aligns the diagonal with the last key, the backward pass with the first.
"""

import sys

import torch
from ring_attention_pytorch.ring_attention import default_attention
from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

query = torch.randn(1, 3, 2, 8)
key, value = torch.randn(2, 1, 5, 2, 8).unbind()
grad_output = torch.randn(1, 3, 2, 8)


def differentiated(function):
    """Return the output and the gradient of the value."""
    operands = [x.clone().requires_grad_() for x in (query, key, value)]
    output = function(*operands)
    return output.detach(), torch.autograd.grad(output, operands, grad_output)[2]


output, gradient = differentiated(lambda *operands: ring_flash_attn(*operands, None, True))
expected, expected_gradient = differentiated(lambda *operands: default_attention(*operands, None, True))
print("outputs of ring_flash_attn and default_attention differ by", float((output - expected).abs().max()))
print("gradients of the value by autograd differ by", float((gradient - expected_gradient).abs().max()))
print("ring_flash_attn: gradient of the last value", gradient[0, -1, 0, :3].tolist())
sys.exit(not ((output - expected).abs().max() < 1e-4 and (gradient - expected_gradient).abs().max() > 1e-2))
