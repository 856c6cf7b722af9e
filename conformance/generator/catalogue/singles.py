"""Each option alone, at the head sizes 64 and 128 and at prime sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .build import vary
from .sizes import ONE_QUERY, PRIME, SQUARE, head_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from description import Description

VISIBILITY = (("generic", 0), ("coded", 1), ("low", 2), ("levels", 3))
ARITHMETIC = (("generic", 0), ("random", 1), ("steep", 2), ("far", 3))
OFFSETS = (("generic", 0), ("random", 1), ("coded", 2), ("low", 3))

AT_64: tuple[tuple[str, dict[str, Any], bool, Any], ...] = (
    ("mask", {"mask": "b1qk"}, False, VISIBILITY),
    ("bias", {"bias": "1hqk"}, False, ARITHMETIC),
    ("causal", {"causal": True}, True, (("generic", 0), ("coded", 0), ("low", 0))),
    ("causal+offset", {"causal": True, "offset": True}, False, OFFSETS),
    ("window", {"window": (2, 1)}, True, (("generic", 0), ("coded", 0), ("low", 0))),
    ("q_lengths", {"q_lengths": True}, False, VISIBILITY),
    ("kv_lengths", {"kv_lengths": True}, False, VISIBILITY),
    ("segments", {"segments": True}, False, VISIBILITY),
    ("scale", {"scale": 0.25}, False, (("generic", 0), ("steep", 0), ("far", 0))),
    ("softcap", {"softcap": 2.0}, False, (("generic", 0), ("steep", 0), ("far", 0))),
    ("sinks", {"sinks": True}, False, ARITHMETIC),
    ("dropout", {"dropout": (0.0, "bhqk")}, False, ARITHMETIC),
)
ONLY_AT_128: dict[str, dict[str, Any]] = {
    "window": {"window": (0, 2)},
    "scale": {"scale": -0.125},
    "softcap": {"softcap": 5.0},
    "dropout": {"dropout": (0.25, "b1qk")},
}
AT_128 = tuple((name, ONLY_AT_128.get(name, spec), square, variants) for name, spec, square, variants in AT_64)
WINDOWS = ((0, 0), (None, 0), (2, None))
SCALES = (0.0, 3.0)


def descriptions() -> Iterator[Description]:
    """Yield each option at 64 and 128, then further windows, scales, softcaps and offsets."""
    for size, table in ((64, AT_64), (128, AT_128)):
        for name, spec, square, variants in table:
            yield from vary(f"{name}/size-{size}", head_size(size, square=square), spec, variants)
    for window in WINDOWS:
        left, right = ("none" if side is None else side for side in window)
        yield from vary(
            f"window/{left}-{right}", SQUARE, {"window": window}, [("generic", 0), ("coded", 0), ("low", 0)]
        )
    for scale in SCALES:
        yield from vary(
            f"scale/{scale:g}", PRIME, {"scale": scale}, [("generic", 0), ("random", 0), ("levels", 0)], lse=True
        )
    yield from vary("softcap/50", PRIME, {"softcap": 50.0}, [("steep", 0), ("levels", 0), ("far", 0)])
    yield from vary("causal+offset/integer", PRIME, {"causal": True, "offset": 0}, [("generic", 0), ("coded", 0)])
    for name, spec in (("causal+offset", {"causal": True}), ("window+offset", {"window": (2, None)})):
        variants = [("generic", 4), ("coded", 5), ("levels", 0), *([("random", 1)] if name == "window+offset" else [])]
        yield from vary(f"{name}/one-query", ONE_QUERY, {**spec, "offset": True}, variants)
    yield from vary("causal+offset/prime", PRIME, {"causal": True, "offset": True}, OFFSETS)
