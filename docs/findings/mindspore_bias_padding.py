# /// script
# dependencies = ["asttokens==3.0.2", "dill==0.4.1", "mindspore==2.10.0", "numpy==1.26.4"]
# ///
"""MindSpore: with a floating-point `attn_mask`, `key_padding_mask` adds 1 to the padded keys instead of hiding them."""

import sys

import numpy
from mindspore import Tensor, nn

numbers = numpy.random.default_rng(0)
layer = nn.MultiheadAttention(8, 2, batch_first=True).set_train(False)
tokens = Tensor(numbers.standard_normal((1, 4, 8), "float32"))
padding = Tensor(numpy.array([[False, False, True, True]]))
zeros = Tensor(numpy.zeros((4, 4), "float32"))
alone = layer(tokens, tokens, tokens, key_padding_mask=padding)[1].asnumpy()[0, 0]
both = layer(tokens, tokens, tokens, key_padding_mask=padding, attn_mask=zeros)[1].asnumpy()[0, 0]
print("weights of query 0 with key_padding_mask:", alone)
print("and with an attn_mask of zeros as well:  ", both)
sys.exit(not (alone[2:].max() == 0 and both[2:].min() > 0.1))
