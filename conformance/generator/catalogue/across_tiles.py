"""Every option, alone, with causal and in the pairs that models use, at lengths of several tiles.

The lengths are on and off the edges of tiles of 64 and 128. One shape serves every option, because a compiled target
pays for each shape; the largest shapes are asked in one or two dtypes. Rows are sampled at the edges and at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .build import describe
from .sized_options import options_of_tiles, tensors_of_tiles
from .sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from description import Description

    Spec = Mapping[str, Any]


class Shape(NamedTuple):
    """The sizes of some cases, the dtypes in which they are asked, and the variants of their options."""

    sizes: Sizes
    dtypes: tuple[str, ...]
    variants: tuple[int, ...]
    offset: str | None = None
    """The reading of the offset of causal and window, if the lengths differ."""


FLOAT32, BFLOAT16, FLOAT16 = ("float32",), ("bfloat16",), ("float16",)

ALONE: dict[str, Spec] = {
    "plain": {},
    "mask": {"mask": "b1qk"},
    "bias": {"bias": "1hqk"},
    "causal": {"causal": True},
    "window": {"window": ((70, 21), (63, 64))},
    "q_lengths": {"q_lengths": True},
    "kv_lengths": {"kv_lengths": True},
    "segments": {"segments": True},
    "scale": {"scale": 0.1875},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout": "bhqk"},
}
LEFT = ((64, None), (99, None))
"""Windows of causal attention: on and off the edge of a tile."""

CAUSAL: dict[str, Spec] = {
    f"causal+{name}": {"causal": True, **spec} | ({"window": LEFT} if name == "window" else {})
    for name, spec in ALONE.items()
    if name not in ("plain", "causal")
}
TOGETHER: dict[str, Spec] = {
    "mask+bias": {"mask": "11qk", "bias": "bh1k"},
    "bias+softcap": {"bias": "1hqk", "softcap": 3.0},
    "window+softcap": {"window": ((70, 21), (63, 64)), "softcap": 3.0},
    "window+sinks": {"window": ((70, 21), (63, 64)), "sinks": True},
    "causal+window+softcap": {"causal": True, "window": LEFT, "softcap": 3.0},
    "causal+window+sinks": {"causal": True, "window": LEFT, "sinks": True},
    "causal+window+segments": {"causal": True, "window": ((20, None), (31, None)), "segments": True},
    "q_lengths+kv_lengths": {"q_lengths": True, "kv_lengths": True},
    "causal+q_lengths+kv_lengths": {"causal": True, "q_lengths": True, "kv_lengths": True},
}
EVERY = ALONE | CAUSAL | TOGETHER

FORWARD: dict[str, Shape] = {
    "128": Shape(Sizes(2, 2, 2, 128, 128, 64, 64), FLOAT32, (0, 1)),
    "257": Shape(Sizes(2, 2, 2, 257, 257, 64, 64), FLOAT32, (2,)),
    "256-grouped": Shape(Sizes(1, 8, 2, 256, 256, 64, 64), BFLOAT16, (1, 3)),
    "192-333": Shape(Sizes(2, 4, 1, 192, 333, 64, 64), FLOAT32, (2,), "inside"),
    "129-255": Shape(Sizes(1, 4, 1, 129, 255, 128, 128), BFLOAT16, (0,), "lower_right"),
}
OFTEN = ("scale", "dropout", *CAUSAL, *TOGETHER)
"""The specs that are asked once more at lengths of 257."""

BACKWARD: dict[str, Shape] = {
    "128": Shape(Sizes(2, 2, 2, 128, 128, 64, 64), FLOAT32 + FLOAT16, (0, 1)),
    "129-grouped": Shape(Sizes(1, 4, 1, 129, 129, 64, 64), FLOAT32, (2, 3)),
}
BACKWARD_OF_SOME: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "257": (
        Shape(Sizes(1, 2, 2, 257, 257, 64, 64), FLOAT32, (2,)),
        ("plain", "mask", "bias", "causal", "window", "kv_lengths", "segments", "softcap", "sinks", "causal+window"),
    ),
    "65-193": (
        Shape(Sizes(2, 4, 1, 65, 193, 64, 64), FLOAT32, (3,), "lower_right"),
        ("causal", "window", *(name for name in CAUSAL if name != "causal+segments")),
    ),
}
WEIGHTS = Shape(Sizes(2, 2, 2, 128, 128, 64, 64), FLOAT32, (1,))
ROWS = {"attention": 12, "attention_vjp": 10, "attention_weights": 12}
"""The number of sampled rows of each output, if a row has 64 components."""


def descriptions() -> Iterator[Description]:
    """Yield the cases of attention, of its gradients and of its weights."""
    for label, shape in FORWARD.items():
        yield from _cases(label, shape, EVERY, "attention")
    again = FORWARD["257"]._replace(variants=(3,))
    yield from _cases("257", again, {name: EVERY[name] for name in OFTEN}, "attention")
    for label, shape in BACKWARD.items():
        yield from _cases(label, shape, EVERY, "attention_vjp")
    for label, (shape, names) in BACKWARD_OF_SOME.items():
        yield from _cases(label, shape, {name: EVERY[name] for name in names}, "attention_vjp")
    weights = {name: spec for name, spec in (ALONE | CAUSAL).items() if "dropout" not in spec}
    yield from _cases("128", WEIGHTS, weights, "attention_weights")


def _cases(label: str, shape: Shape, specs: Mapping[str, Spec], function: str) -> Iterator[Description]:
    for name, spec in specs.items():
        for variant in shape.variants:
            yield _case(label, shape, name, _placed(spec, shape), variant, function)


def _placed(spec: Spec, shape: Shape) -> Spec:
    """Add the offset that causal and window need where the lengths differ or keys have lengths."""
    if "causal" not in spec and "window" not in spec:
        return spec
    if "kv_lengths" in spec and ("q_lengths" in spec or shape.offset == "lower_right"):
        return {**spec, "reading": "lower_right"}
    if shape.offset is not None or "kv_lengths" in spec:
        return {**spec, "offset": shape.offset or "upper_left"}
    return spec


def _case(label: str, shape: Shape, name: str, spec: Spec, variant: int, function: str) -> Description:
    more, options = options_of_tiles(shape.sizes, spec, variant)
    sizes = shape.sizes
    lengths = f"{sizes.q_len} queries over {sizes.kv_len} keys"
    return describe(
        f"tiles/{label}/{name}/{variant + 1}",
        f"{lengths}: {' and '.join(EVERY[name]) or 'no option'}, which differ from tile to tile.",
        sizes,
        {**tensors_of_tiles(sizes, variant, function), **more},
        options,
        function=function,
        dtypes=shape.dtypes,
        sampled_rows=ROWS[function] * 64 // sizes.v_dim,
        edges=True,
    )
