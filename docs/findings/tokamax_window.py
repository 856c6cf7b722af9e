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
"""tokamax: `local_window_size` raises an error where the numbers of queries and keys differ; jax.nn computes it."""

import sys

import jax
import tokamax

failures = []
for q_len, kv_len in ((4, 4), (2, 4), (1, 4), (6, 4)):
    query = jax.random.normal(jax.random.key(0), (1, q_len, 2, 8))
    key, value = jax.random.normal(jax.random.key(1), (2, 1, kv_len, 2, 8))
    expected = jax.nn.dot_product_attention(query, key, value, local_window_size=(1, 1))
    for implementation in ("xla", "xla_chunked"):
        try:
            output = tokamax.dot_product_attention(
                query, key, value, local_window_size=(1, 1), implementation=implementation
            )
        except Exception as error:
            failures.append((q_len, implementation))
            print(q_len, "queries,", kv_len, "keys,", implementation, "raises", type(error).__name__, str(error)[:60])
        else:
            difference = abs(output - expected).max()
            print(q_len, "queries,", kv_len, "keys,", implementation, "differs from jax.nn by", difference)
sys.exit(failures != [(2, "xla"), (1, "xla"), (6, "xla"), (6, "xla_chunked")])
