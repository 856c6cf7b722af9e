# /// script
# dependencies = [
#     "einshape==1.0",
#     "immutabledict==4.3.1",
#     "jax==0.10.2",
#     "qwix==0.1.8",
#     "tensorboardx==2.6.5",
#     "tokamax==0.0.12",
#     "typeguard==2.13.3",
# ]
# ///
"""tokamax's `dot_product_attention` with `implementation="xla_chunked"`, otherwise as tokamax_attention.py calls it.

It computes float64 in float32, and float64 is not asked.
"""

from __future__ import annotations

from functools import partial

import tokamax_attention
from tokamax_attention import arrays, conventions, features, layout, supports

__all__ = ["arrays", "attention", "attention_vjp", "conventions", "features", "layout", "supports"]

dtypes = ("float32", "bfloat16")

attention = partial(tokamax_attention.attention, implementation="xla_chunked")
attention_vjp = partial(tokamax_attention.attention_vjp, implementation="xla_chunked")
