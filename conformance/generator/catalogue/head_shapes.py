"""Numbers of heads, sizes of groups and sizes of heads of real models, plain and causal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .build import describe
from .sized_options import options_of_tiles, tensors_of_tiles
from .sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

HEADS: dict[str, Sizes] = {
    "1-over-1": Sizes(1, 1, 1, 5, 33, 64, 64),
    "2-over-1": Sizes(5, 2, 1, 5, 33, 64, 64),
    "8-over-2": Sizes(3, 8, 2, 5, 33, 64, 64),
    "16-over-8": Sizes(1, 16, 8, 3, 17, 128, 128),
    "24-over-3": Sizes(3, 24, 3, 2, 17, 128, 128),
    "28-over-4": Sizes(5, 28, 4, 2, 17, 128, 128),
    "32-over-2": Sizes(1, 32, 2, 3, 33, 64, 64),
    "71-over-1": Sizes(1, 71, 1, 3, 33, 64, 64),
    "71-over-71": Sizes(1, 71, 71, 2, 9, 64, 64),
    "128-over-8": Sizes(1, 128, 8, 2, 17, 64, 64),
    "128-over-128": Sizes(1, 128, 128, 2, 9, 64, 64),
}
SIZES: dict[str, tuple[int, int]] = {
    **{str(size): (size, size) for size in (32, 40, 72, 80, 96, 112, 160, 192, 256)},
    "192-128": (192, 128),
    "576-512": (576, 512),
}
BACKWARD = ("8-over-2", "28-over-4", "32-over-2", "71-over-1", "40", "80", "96", "192-128", "256")
ROWS = {"attention": 12, "attention_vjp": 6}
"""The number of sampled rows of each output, if a row has at most 64 components."""


def descriptions() -> Iterator[Description]:
    """Yield each shape twice, in two dtypes, and some as gradients."""
    shapes = HEADS | {name: Sizes(1, 2, 1, 5, 33, *sizes) for name, sizes in SIZES.items()}
    for name, sizes in shapes.items():
        label = f"{'heads' if name in HEADS else 'size'}/{name}"
        yield _case(label, sizes, 0, "attention", "float32")
        yield _case(label, sizes, 1, "attention", "bfloat16")
        if name in BACKWARD:
            yield _case(label, sizes, 1, "attention_vjp", "float32")


def _case(label: str, sizes: Sizes, variant: int, function: str, dtype: str) -> Description:
    spec = {"causal": True, "offset": "lower_right"} if variant else {}
    more, options = options_of_tiles(sizes, spec, variant)
    heads = f"{sizes.heads} heads over {sizes.kv_heads}, of size {sizes.qk_dim} and values of size {sizes.v_dim}"
    return describe(
        f"{label}/{'causal' if spec else 'plain'}",
        f"{heads}{', causal from the lower right' if spec else ''}.",
        sizes,
        {**tensors_of_tiles(sizes, 0, function), **more},
        options,
        function=function,
        dtypes=(dtype,),
        sampled_rows=max(ROWS[function] * 64 // max(sizes.v_dim, 64), 2),
    )
