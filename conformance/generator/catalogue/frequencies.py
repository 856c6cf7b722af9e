"""Rotation by frequencies of the caller, as models scale them for long contexts, and by an attention factor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from description import ALL_DTYPES, Description, Input

from .caches import case_of_cache
from .layer_build import WEIGHTS, vary_layer
from .layer_sizes import CROSS, NORMS, STEP
from .options import integers
from .tensors import bell

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import ArrayLike

__all__ = ["TABLES", "Table"]


class Table(NamedTuple):
    """The frequencies of 8 pairs and the attention factor of a scaling."""

    title: str
    frequencies: list[float]
    attention_factor: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The options of rotary_embedding, without those that have their default."""
        factor = {} if self.attention_factor == 1 else {"attention_factor": self.attention_factor}
        return {"frequencies": self.frequencies, **factor}


TABLES = {
    "linear": Table(
        "linear scaling by 4",
        [
            *(0.25, 0.07905694097280502, 0.02500000037252903, 0.007905694656074047),
            *(0.0024999999441206455, 0.0007905694656074047, 0.0002500000118743628, 7.905694656074047e-05),
        ],
    ),
    "dynamic": Table(
        "dynamic scaling by 2, of 1024 tokens after 64",
        [
            *(1.0, 0.19361916184425354, 0.03748837858438492, 0.007258468307554722),
            *(0.001405378570780158, 0.00027210821281187236, 5.268536551739089e-05, 1.0200895303569268e-05),
        ],
    ),
    "yarn": Table(
        "YaRN by 4, after 512 tokens",
        [
            *(1.0, 0.2569350600242615, 0.0625, 0.013834965415298939),
            *(0.0024999999441206455, 0.0007905694656074047, 0.0002500000118743628, 7.905694656074047e-05),
        ],
        1.138629436111989,
    ),
    "longrope": Table(
        "the long factors of LongRoPE, by 4 after 64 tokens",
        [
            *(1.0, 0.2529822289943695, 0.05714285746216774, 0.012649111449718475),
            *(0.0028571428265422583, 0.0006324555724859238, 0.0001250000059371814, 2.874797792173922e-05),
        ],
        1.1547005383792517,
    ),
    "llama3": Table(
        "the scaling of Llama 3 by 8, after 128 tokens",
        [
            *(1.0, 0.3162277638912201, 0.04275117814540863, 0.0039528473280370235),
            *(0.0012499999720603228, 0.00039528473280370235, 0.0001250000059371814, 3.9528473280370235e-05),
        ],
    ),
    "proportional": Table(
        "proportional scaling, by which half of the pairs do not turn",
        [1.0, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619, 0.0, 0.0, 0.0, 0.0],
    ),
}
"""What `rotary_frequencies` gives for 16 components and the base 10000, in float32."""

SIZE = 16
LAYER_OF_TABLES = CROSS._replace(qk_dim=SIZE)
STEP_OF_TABLES = STEP._replace(qk_dim=SIZE)
CHUNKED_OF_TABLES = STEP_OF_TABLES._replace(q_len=6, kv_len=6)
FACTORS = {"halves": 1.25, "interleaved": 0.5, "partial": 1.1544, "partial-interleaved": 3.0}
FEW = ("float32", "bfloat16")
"""Dtypes of cases of tables, each of which has options of its own, for which a target may be compiled."""

THREE = [2.5, 0.25, 0.015625]
"""Frequencies of three pairs, the first of which is above that of every base."""


def descriptions() -> Iterator[Description]:
    """Yield each table in the embedding and in the layer, frequencies of 0, factors, far positions and caches."""
    for name, table in TABLES.items():
        yield _halves(name, table)
        yield _neighbours(name, table)
        yield from _of_layer(name, table)
    yield from _some_without_a_turn()
    yield from _factors()
    yield from _far()
    yield from _layers()
    yield from _caches()


def _halves(name: str, table: Table) -> Description:
    title = f"Halves turn by the frequencies of {table.title}."
    return _embedded(f"frequencies/{name}", title, (1, 2, 3, SIZE), [40, 203, 1001], table.options)


def _neighbours(name: str, table: Table) -> Description:
    title = f"Neighbours turn by the frequencies of {table.title}; two components stay."
    options = {"interleaved": True, "rotary_dim": SIZE, **table.options}
    positions = [[700, -350, 5], [-64, 511, 900]]
    return _embedded(f"frequencies/{name}-interleaved", title, (2, 1, 3, SIZE + 2), positions, options, FEW)


def _of_layer(name: str, table: Table) -> Iterator[Description]:
    title = f"Queries far behind the keys, and {table.title}."
    options = {"rotary": table.options, "q_offset": 300, "dtypes": FEW}
    yield from vary_layer(f"frequencies/{name}", title, LAYER_OF_TABLES, variants=(0,), **options)


def _embedded(
    name: str,
    title: str,
    shape: tuple[int, ...],
    positions: ArrayLike,
    options: Mapping[str, Any],
    dtypes: tuple[str, ...] = ALL_DTYPES,
) -> Description:
    held = {
        "MHA-ROTARY-1": True,
        "MHA-ROTARY-2": "interleaved" in options,
        "MHA-ROTARY-3": "rotary_dim" in options,
        "MHA-ROTARY-4": True,
        "MHA-ROTARY-5": True,
        "MHA-ROTARY-7": "frequencies" in options,
        "MHA-ROTARY-8": "attention_factor" in options,
    }
    return Description(
        id=f"rotary_embedding/{name}",
        title=title,
        function="rotary_embedding",
        clauses=tuple(clause for clause, holds in held.items() if holds),
        features=("rotary",),
        inputs={"x": Input(bell(shape, 2.0**-3, "rotated")), "positions": integers(positions)},
        options=options,
        tags=("structured",),
        dtypes=dtypes,
    )


def _some_without_a_turn() -> Iterator[Description]:
    shape, positions = (2, 1, 3, 6), [[2, 0, 13], [7, 31, 5]]
    title = "The second of three pairs has the frequency 0."
    yield _embedded("frequencies/zero", title, shape, positions, {"frequencies": [2.5, 0.0, 0.25]})
    title = "A pair that does not turn is multiplied by the attention factor, two other components are not."
    options = {"frequencies": [0.75, 0.0], "rotary_dim": 4, "attention_factor": 1.5}
    yield _embedded("frequencies/zero-magnified", title, shape, positions, options)


def _factors() -> Iterator[Description]:
    for name, factor in FACTORS.items():
        options: dict[str, Any] = {"interleaved": True} if "interleaved" in name else {}
        options |= {"rotary_dim": 4} if "partial" in name else {}
        title = f"{name.capitalize().replace('-', ', ')}: cosines and sines times {factor:g}."
        options |= {"attention_factor": factor}
        yield _embedded(f"attention-factor/{name}", title, (2, 2, 3, 6), [9, 4, 31], options)


def _far() -> Iterator[Description]:
    for name, position in (("yarn", 32_769), ("llama3", 2**20)):
        title = f"Frequencies of {TABLES[name].title}, near position {position}."
        positions = [position, position + 3, position + 34]
        more = {"dtypes": ALL_DTYPES[:2]}
        yield _embedded(f"frequencies/far/{position}", title, (1, 2, 3, SIZE), positions, TABLES[name].options, **more)


def _layers() -> Iterator[Description]:
    rotary = {"rotary_dim": 4, "attention_factor": 2.0}
    title = "Four of six components turn and are doubled, which no scale expresses."
    yield from vary_layer("attention-factor", title, CROSS, ("b_k",), {"offset": 4}, rotary=rotary, variants=(0, 1))
    rotary = {"frequencies": THREE, "interleaved": True, "attention_factor": 1.5}
    title = "Normalised, and turned by frequencies of the caller, times a factor."
    yield from vary_layer("frequencies/norm", title, CROSS, NORMS, {"offset": 4}, rotary=rotary, variants=(0, 1))
    title = "Weights of queries and keys that turn by frequencies of the caller, times a factor."
    more: dict[str, Any] = {"function": WEIGHTS, "clauses": ("MHA-LAYER-4",), "variants": (0,)}
    yield from vary_layer("frequencies", title, CROSS, (), {"offset": 4, "scale": 0.125}, rotary=rotary, **more)


def _caches() -> Iterator[Description]:
    causal = {"causal": True}
    for variant, (name, lengths) in enumerate((("yarn", (3, 5)), ("llama3", (0, 7)))):
        title = f"A token behind {lengths[0]} and {lengths[1]} others, and {TABLES[name].title}."
        more: dict[str, Any] = {"outputs": ("output", "cache_key"), "rotary": TABLES[name].options}
        yield case_of_cache(f"cache/frequencies/{name}", title, STEP_OF_TABLES, variant, lengths, **more)
    title = f"Six tokens in three calls, and {TABLES['longrope'].title}."
    more = {"chunks": [3, 1, 2], "rotary": TABLES["longrope"].options, "clauses": ("MHA-CACHE-2",)}
    yield case_of_cache("cache/frequencies/longrope", title, CHUNKED_OF_TABLES, 2, (2, 0), NORMS, causal, **more)
