# /// script
# dependencies = [
#     "anyio==4.16.0",
#     "certifi==2026.10.19.post1",
#     "h11==0.16.0",
#     "httpcore==1.0.9",
#     "httpx==0.28.1",
#     "idna==3.20",
#     "networkx==3.6.1",
#     "opt_einsum==3.4.0",
#     "paddlepaddle==3.3.1",
# ]
# ///
"""PaddlePaddle: on a CPU, keys that a mask hides keep a weight of exp(-64)."""

import sys

import numpy as np
import paddle
from paddle.nn.functional import scaled_dot_product_attention, softmax

paddle.set_device("cpu")
print("softmax", softmax(paddle.to_tensor([0.0, -float("inf")])).numpy())  # 1, 1.6038108e-28
query = paddle.zeros([1, 2, 1, 1])
value = paddle.to_tensor(np.array([1, 1e30], "float32").reshape(1, 2, 1, 1))
mask = paddle.to_tensor(np.array([[True, False], [True, False]])[None, None])
masked = scaled_dot_product_attention(query, query, value, attn_mask=mask).numpy().ravel()
causal = scaled_dot_product_attention(query, query, value, is_causal=True).numpy().ravel()
print("only the value 1 is visible:", masked)  # 161.38
print("so it is to the first query of a causal call:", causal[0])  # 161.38
sys.exit(not (masked[0] > 100 and causal[0] > 100))
