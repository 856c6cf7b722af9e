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
"""tokamax: without queries or keys, each implementation of `dot_product_attention` has another result or error."""

import sys

import jax.numpy as jnp
import tokamax

results = {}
for name, q_len, kv_len in (("queries", 0, 3), ("keys", 3, 0)):
    query, key = jnp.ones((1, q_len, 2, 8)), jnp.ones((1, kv_len, 2, 8))
    for implementation in ("xla", "xla_chunked"):
        try:
            output = tokamax.dot_product_attention(query, key, key, implementation=implementation)
            result = "NaN" if jnp.isnan(output).any() else f"an output of shape {output.shape}"
        except Exception as error:
            result = type(error).__name__
        results[name, implementation] = result
        print(f"without {name}, {implementation} gives {result}")
sys.exit([*results.values()] != ["an output of shape (1, 0, 2, 8)", "TypeCheckError", "ValueError", "NaN"])
