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
"""PaddlePaddle: `scaled_dot_product_attention(scale=0.0)` has the default scale."""

import sys

import numpy as np
import paddle
from paddle.nn.functional import scaled_dot_product_attention

paddle.set_device("cpu")
rng = np.random.default_rng(0)
query, key, value = (paddle.to_tensor(rng.normal(size=(1, 4, 1, 8)).astype("float32")) for _ in range(3))
zero = scaled_dot_product_attention(query, key, value, scale=0.0).numpy()
tiny = scaled_dot_product_attention(query, key, value, scale=1e-30).numpy()
default = scaled_dot_product_attention(query, key, value).numpy()
print("0.0 differs from the default by", abs(zero - default).max())  # 0.0
print("1e-30 differs from the default by", abs(tiny - default).max())  # more than 0.1
sys.exit(not (np.array_equal(zero, default) and abs(tiny - default).max() > 0.1))
