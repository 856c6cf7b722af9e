"""Gradients at the edges, with the specs of `gradients`: garbage, empty rows, single cotangents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from description import ALL_DTYPES, Input

from .build import describe, inputs_of
from .gradients import FUNCTION, OTHER_SIZES, SPECS, dtypes_of, name_of
from .options import integers
from .poison import GARBAGE, half_poisoned, poisoned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from description import Description

    Inputs = dict[str, Input]

LARGE = (57344.0, -57344.0, 49152.0)
"""Garbage that is finite and exact in every dtype; its scores exceed float16, and their exponentials every dtype."""

POISONED = {("random", 2), ("random", 3)}
"""Specs that `gradients` poisons already."""

SMALL = ("float64", "float32", "float16")
"""Gradients that nearly cancel are too inaccurate in bfloat16."""

SPEC_OF_NAME = {name_of(spec): (sizes, spec) for sizes, spec, _ in SPECS}


class Edge(NamedTuple):
    """A case of a spec of `gradients`, with some of its inputs changed."""

    spec: str
    label: str
    title: str
    change: Callable[[Inputs], Inputs]
    clauses: tuple[str, ...] = ()
    flavour: str = "generic"
    variant: int = 0
    dtypes: tuple[str, ...] = ALL_DTYPES

    def description(self) -> Description:
        """Describe the case."""
        sizes, spec = SPEC_OF_NAME[self.spec]
        inputs, options = inputs_of(sizes, self.flavour, spec, self.variant, FUNCTION)
        return describe(
            f"{self.spec}/{self.label}",
            self.title,
            sizes,
            {**inputs, **self.change(inputs)},
            options,
            function=FUNCTION,
            clauses=self.clauses,
            dtypes=self.dtypes,
        )


def descriptions() -> Iterator[Description]:
    """Yield cases with garbage that must not change the results, then cases of single contents."""
    yield from _garbage()
    yield from _seen_by_some()
    yield from _garbage_beside_nothing()
    for edge in _EDGES:
        yield edge.description()


def _garbage() -> Iterator[Description]:
    """Yield the cases of `gradients` with garbage that no pair reads, which must not change any result."""
    titles = {
        "not-finite": (GARBAGE, "NaN and infinities in storage that no pair uses reach no gradient."),
        "large": (LARGE, "Large numbers in storage that no pair uses, whose scores overflow, reach no gradient."),
    }
    for sizes, spec, variants in SPECS:
        name = name_of(spec)
        for flavour, variant in variants:
            if flavour not in ("generic", "random") or (flavour, variant) in POISONED or name == "everything":
                continue
            inputs, options = inputs_of(sizes, flavour, spec, variant, FUNCTION)
            for label, (garbage, title) in titles.items():
                if label == "large" and flavour != "generic":
                    continue
                spoilt = poisoned(sizes, inputs, options, garbage)
                if all(spoilt[key] is item for key, item in inputs.items() if key != "bias"):
                    continue
                yield describe(
                    f"poison/{name}/{label}-{flavour}-{variant + 1}",
                    title,
                    sizes,
                    spoilt,
                    options,
                    function=FUNCTION,
                    clauses=("MHA-POISON-1", "MHA-EMPTY-3"),
                    features=("poison",),
                    tags=("structured", "poison"),
                    dtypes=dtypes_of(name, flavour, variant),
                )


def _seen_by_some() -> Iterator[Description]:
    for name in ("mask", "causal+offset", "segments+scale"):
        sizes, spec = SPEC_OF_NAME[name]
        inputs, options = inputs_of(sizes, "generic", spec, 2, FUNCTION)
        spoilt = half_poisoned(sizes, inputs, options)
        if spoilt is None:
            continue
        yield describe(
            f"poison/{name}/seen-by-some",
            "A NaN key and value reach the gradients of the rows that see them, and no other row's.",
            sizes,
            spoilt,
            options,
            function=FUNCTION,
            clauses=("MHA-POISON-2",),
            features=("poison",),
            tags=("structured", "poison"),
            dtypes=dtypes_of(name, "generic", 2),
            level="SHOULD",
        )


def _garbage_beside_nothing() -> Iterator[Description]:
    """Yield cases without keys, or without queries, in which no input is read."""
    for name, filled in (("no-keys", ("query", "grad_output")), ("no-queries", ("key", "value"))):
        sizes = OTHER_SIZES[name]
        inputs, options = inputs_of(sizes, "generic", {}, 0, FUNCTION)
        spoilt = {label: _resized(inputs[label], GARBAGE) for label in filled}
        yield describe(
            f"poison/{name}/everywhere",
            "NaN and infinities with nothing to attend to, or to attend: every gradient is 0.",
            sizes,
            {**inputs, **spoilt},
            options,
            function=FUNCTION,
            clauses=("MHA-POISON-1", "MHA-SHAPE-2", "MHA-EMPTY-3"),
            features=("poison",),
            tags=("structured", "poison"),
        )


def _resized(item: Input, numbers: tuple[float, ...]) -> Input:
    return Input(numpy.resize(numbers, item.values.shape), item.dtype)


def _where(name: str, *places: Any, to: Any) -> Callable[[Inputs], Inputs]:
    """Set elements of one input, each named by an index."""

    def change(inputs: Inputs) -> Inputs:
        values = inputs[name].values.copy()
        for place in places:
            values[place] = to
        return {name: Input(values, inputs[name].dtype)}

    return change


def _alone(name: str, *places: Any) -> Callable[[Inputs], Inputs]:
    """Keep one input at some places, and set it to 0 elsewhere."""

    def change(inputs: Inputs) -> Inputs:
        values = numpy.zeros_like(inputs[name].values)
        for place in places:
            values[place] = inputs[name].values[place]
        return {name: Input(values, inputs[name].dtype)}

    return change


def _integers(**values: Any) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {name: integers(value) for name, value in values.items()}


def _hidden_and_spoilt(inputs: Inputs) -> Inputs:
    """Hide every pair of the second batch entry, and fill the entry with garbage."""
    changed = _where("mask", 1, to=False)(inputs)
    for name in ("query", "key", "value", "grad_output"):
        values = inputs[name].values.copy()
        values[1] = numpy.resize(GARBAGE, values[1].shape)
        changed[name] = Input(values, inputs[name].dtype)
    return changed


EVERY = slice(None)
ONE_HEAD = (EVERY, slice(2, 3))
"""The last head of the first group: it reads kv head 0, or another one if groups are tiled."""

_EDGES = (
    Edge(
        "mask",
        "hidden-entry",
        "A batch entry whose mask hides everything: its gradients are 0.",
        _where("mask", 1, to=False),
        ("MHA-EMPTY-3", "MHA-PURE-3"),
        dtypes=SMALL,
    ),
    Edge(
        "mask",
        "nothing-visible",
        "A mask that hides everything: every gradient is 0.",
        _where("mask", ..., to=False),
        ("MHA-EMPTY-3",),
    ),
    Edge(
        "mask",
        "hidden-entry-of-garbage",
        "A batch entry whose mask hides everything, over NaN and infinities: its gradients are 0.",
        _hidden_and_spoilt,
        ("MHA-EMPTY-3", "MHA-POISON-1"),
        dtypes=SMALL,
    ),
    Edge(
        "bias",
        "hidden-rows",
        "Rows, one of every head and all of one head, whose bias is -inf everywhere: their gradients are 0.",
        _where("bias", (0, EVERY, 2), (0, 4), to=-numpy.inf),
        ("MHA-EMPTY-3", "MHA-BIAS-3"),
        flavour="random",
    ),
    Edge(
        "bias+grad_lse",
        "hidden-entry",
        "A batch entry whose bias is -inf everywhere: its rows give nothing, though their lse has a cotangent.",
        _where("bias", 1, to=-numpy.inf),
        ("MHA-EMPTY-3", "MHA-BIAS-3"),
        flavour="random",
    ),
    Edge(
        "bias+grad_lse",
        "lse-alone",
        "A cotangent of lse alone in all heads but one, through a bias that is summed over heads and rows.",
        _alone("grad_output", ONE_HEAD),
        ("MHA-LSE-3",),
        variant=1,
    ),
    Edge(
        "bias+sinks",
        "one-key",
        "A bias that leaves one key beside the sink.",
        _where("bias", (..., [0, 1, 2, 4, 5, 6]), to=-numpy.inf),
        ("MHA-BIAS-3", "MHA-VJP-6"),
    ),
    Edge(
        "sinks+grad_lse",
        "one-sink",
        "Sinks of -inf in every head but one: they are none, and their gradients are 0.",
        _where("sinks", [0, 1, 2, 4, 5], to=-numpy.inf),
        ("MHA-SINK-2", "MHA-VJP-6"),
        dtypes=SMALL,
    ),
    Edge(
        "sinks+grad_lse",
        "lse-alone",
        "A cotangent of lse alone in all heads but one: its gradient reaches queries, keys and sinks.",
        _alone("grad_output", ONE_HEAD),
        ("MHA-LSE-3", "MHA-VJP-6"),
        flavour="random",
    ),
    Edge(
        "grad_lse",
        "lse-alone",
        "A cotangent of lse alone in all heads but one, and none of it reaches the values.",
        _alone("grad_output", ONE_HEAD),
        ("MHA-LSE-3",),
    ),
    Edge(
        "plain",
        "one-head",
        "One head of each batch entry has a cotangent: keys and values have gradients in its group alone.",
        _alone("grad_output", ONE_HEAD),
        ("MHA-VJP-4", "MHA-HEAD-1"),
    ),
    Edge(
        "plain",
        "one-row",
        "One row of one head has a cotangent: no other row has a gradient.",
        _alone("grad_output", (1, 4, 3)),
        ("MHA-VJP-4", "MHA-PURE-3"),
        flavour="random",
    ),
    Edge(
        "plain",
        "zero-query",
        "Queries of zeros: flat weights, and keys whose gradient is 0.",
        _where("query", ..., to=0.0),
        ("MHA-VJP-2",),
    ),
    Edge(
        "softcap",
        "zero-key-1",
        "Keys of zeros under a softcap, whose slope is 1 there.",
        _where("key", (EVERY, EVERY, slice(0, None, 2)), to=0.0),
        ("MHA-CAP-1",),
    ),
    Edge(
        "mask+softcap+dropout+grad_lse",
        "zero-query-1",
        "Queries of zeros under a softcap beside a head that sees nothing and a row that is dropped.",
        _where("query", (EVERY, EVERY, slice(0, None, 2)), to=0.0),
        ("MHA-CAP-1", "MHA-DROP-3", "MHA-EMPTY-3"),
        flavour="random",
        variant=2,
    ),
    Edge(
        "mask+softcap+dropout+grad_lse",
        "dropped-rows",
        "Two rows of every head and all of one head are dropped: they see, so their lse keeps its gradient.",
        _where("dropout_mask", (EVERY, EVERY, [1, 3]), (EVERY, 2), to=False),
        ("MHA-DROP-3", "MHA-LSE-3"),
    ),
    Edge(
        "dropout",
        "dropped-rows",
        "Rows of which every weight is dropped: no output, and no gradient.",
        _where("dropout_mask", (EVERY, EVERY, 1), (0, 3), to=False),
        ("MHA-DROP-3",),
    ),
    Edge(
        "dropout",
        "dropped-key",
        "A key that every row drops: its value has no gradient, the key itself has.",
        _where("dropout_mask", (..., 5), to=False),
        ("MHA-DROP-3", "MHA-VJP-3"),
        flavour="random",
    ),
    Edge(
        "causal+offset",
        "before-the-keys",
        "An offset so negative that no row of a batch entry reaches a key, and one that leaves two rows some.",
        _integers(q_offset=(-5, -3)),
        ("MHA-POS-1", "MHA-EMPTY-3"),
        flavour="random",
        dtypes=SMALL,
    ),
    Edge(
        "causal+offset",
        "past-the-keys",
        "Offsets at and past the last key.",
        _integers(q_offset=(3, 40)),
        ("MHA-POS-1",),
    ),
    Edge(
        "window+offset",
        "past-the-keys",
        "An offset whose window lies past the last key for most rows, and one whose window lies before the first.",
        _integers(q_offset=(6, -3)),
        ("MHA-POS-1", "MHA-EMPTY-3"),
        flavour="random",
        dtypes=SMALL,
    ),
    Edge(
        "q_lengths+kv_lengths",
        "keys-alone",
        "All rows, over keys of 1 and of all but one.",
        _integers(q_lengths=(5, 5), kv_lengths=(1, 6)),
        (),
        flavour="random",
    ),
    Edge(
        "q_lengths+kv_lengths",
        "queries-alone",
        "All keys, under no row and under all but one.",
        _integers(q_lengths=(0, 4), kv_lengths=(7, 7)),
        ("MHA-EMPTY-3",),
    ),
    Edge(
        "segments+scale",
        "one-side-only",
        "A batch entry whose segments never meet beside one that is all of one segment.",
        _integers(q_segment_ids=((5,) * 5, (1,) * 5), kv_segment_ids=((6,) * 7, (1,) * 6 + (2,))),
        ("MHA-SEG-2", "MHA-EMPTY-3"),
        flavour="random",
    ),
)
