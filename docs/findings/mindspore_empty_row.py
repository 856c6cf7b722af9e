# /// script
# dependencies = ["asttokens==3.0.2", "dill==0.4.1", "mindspore==2.10.0", "numpy==1.26.4"]
# ///
"""MindSpore: where a mask hides all keys of a query, the weights of `MultiheadAttention` are uninitialised memory."""

import sys

import numpy
from mindspore import Tensor, nn

numbers = numpy.random.default_rng(0)
layer = nn.MultiheadAttention(8, 2, batch_first=True, has_bias=False).set_train(False)
mask = numpy.zeros((4, 4), bool)
mask[1] = True  # query 1 sees no key
rows = []
for _ in range(5):
    tokens = Tensor(numbers.standard_normal((1, 4, 8), "float32"))
    weights = layer(tokens, tokens, tokens, attn_mask=Tensor(mask), average_attn_weights=False)[1].asnumpy()
    rows.append(weights[0, 1, 1])
    print("weights of query 1 in head 1:", rows[-1])
# A softmax has no negative weights.
sys.exit(not any((row < 0).any() for row in rows))
