"""Honest ways to compute packed and paged attention, and mistakes in it that the accuracy rule must refuse.

Sequences become dense problems: one for each, a single one with the pairs of two sequences hidden, or a batch with
padding. The implementations of dense attention answer these, and their results are put back at the tokens and slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy
from frameworks import TorchFormula, every_row_sees
from planted import CONTRAST, half
from problems import REGIMES, Problem, overflows, stored
from shares import PLANTED_PROBLEMS, Implementation, SharedProblem, Shares
from variants import KERNELS, VARIANTS, Variant, cubic_exp2_of_difference, with_form

from mha_spec_conformance.judging.bounds import bounds

if TYPE_CHECKING:
    from collections.abc import Callable

    Results = dict[str, numpy.ndarray]
    Dense = Callable[[str, Problem], Results]

__all__ = ["PackedProblem", "Packing", "try_packed"]

LENGTHS = (1, 5, 17, 33, 70, 0)
HEADS = ((2, 2), (4, 2), (3, 1))
SIZES = ((8, 8), (32, 16), (64, 64))
NOWHERE = -1
"""The number of a row of padding in place of a token or of a slot."""


@dataclass(frozen=True)
class PackedProblem(SharedProblem):
    """One packed or paged call, with data of a regime."""

    regime: str

    @property
    def id(self) -> str:
        """The name of the problem in messages."""
        return f"{super().id}, {self.regime}"

    @property
    def forward(self) -> PackedProblem:
        """The call without its cotangents."""
        kept = {name: array for name, array in self.arrays.items() if not name.startswith("grad_")}
        return replace(self, arrays=kept, function="varlen_attention")

    @property
    def work(self) -> type[numpy.floating]:
        """The type of scores, softmax and sums."""
        return numpy.float32

    @cached_property
    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """The tokens of the queries of each sequence, and the slots of its keys in use."""
        ends = pairwise(self.arrays["cu_seqlens_q"].tolist())
        return [(list(range(start, stop)), self._slots(b)) for b, (start, stop) in enumerate(ends)]

    def _slots(self, sequence: int) -> list[int]:
        if "block_table" not in self.arrays:
            start, stop = self.arrays["cu_seqlens_kv"][sequence : sequence + 2].tolist()
            return list(range(start, stop))
        row, size = self.arrays["block_table"][sequence], self.arrays["key"].shape[1]
        length = int(self.arrays["seqused_kv"][sequence])
        return [int(row[key // size]) * size + key % size for key in range(length)]

    def slots_of(self, name: str) -> numpy.ndarray:
        """Return keys or values as (slots, kv_heads, size)."""
        array = self.arrays[name]
        return array.reshape(-1, *array.shape[-2:])

    def offset(self, sequence: int) -> int:
        """Return the position of query 0 of a sequence."""
        queries, slots = self.sequences[sequence]
        return len(slots) - len(queries) if self.options.get("q_offset") == "lower_right" else 0


@dataclass(frozen=True)
class Packing:
    """A way to make dense problems of sequences, and an implementation that answers them."""

    groups: Callable[[PackedProblem], list[list[list[int]]]]
    """Returns the problems; a problem is a list of batch entries, and an entry is a list of sequences."""
    dense: Dense
    strict: bool = False
    """Give the problem in the type of the sums, as kernels do that convert their operands first."""
    shift: int = 0
    """Positions by which the diagonal is wrong."""
    narrow_bias: Any = None
    """The dtype to which the linear bias is rounded."""
    narrow_sums: Any = None
    """The dtype to which the gradient of a slot is rounded after each addition."""
    other_pairs: Callable[[numpy.ndarray], numpy.ndarray] = lambda visible: visible
    """Returns the visible pairs, of which a mistake changes some."""

    def __call__(self, p: PackedProblem) -> Results:
        """Return the results of a call."""
        places = [self._places(p, group) for group in self.groups(p)]
        parts = list(zip(places, self.problems(p), strict=True))
        if p.function == "varlen_attention":
            return self._rows(p, [(tokens, self.dense("attention", part)) for (tokens, _), part in parts])
        return self._gradients(p, [(place, self.dense("attention_vjp", part)) for place, part in parts])

    def problems(self, p: PackedProblem) -> list[Problem]:
        """Return the dense problems of a call."""
        return [self._problem(p, *self._places(p, group)) for group in self.groups(p)]

    def _places(self, p: PackedProblem, group: list[list[int]]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Return the (sequence, index, token) of each row, and the (sequence, index, slot) of each key."""
        tables: list[numpy.ndarray] = []
        for side in (0, 1):
            rows = [
                [(b, index, place) for b in entry for index, place in enumerate(p.sequences[b][side])]
                for entry in group
            ]
            longest = max(map(len, rows))
            padding = (NOWHERE - side, 0, NOWHERE)
            padded = [row + [padding] * (longest - len(row)) for row in rows]
            tables.append(numpy.array(padded, int).reshape(len(rows), longest, 3))
        return tables[0], tables[1]

    def _problem(self, p: PackedProblem, queries: numpy.ndarray, keys: numpy.ndarray) -> Problem:
        """Return the dense problem of some queries and keys."""
        tokens, slots = queries[..., 2], keys[..., 2]
        arrays = {name: _taken(p.arrays[name], tokens) for name in ("query", "grad_output") if name in p.arrays}
        arrays |= {name: _taken(p.slots_of(name), slots) for name in ("key", "value")}
        if "grad_lse" in p.arrays:
            arrays["grad_lse"] = _taken(p.arrays["grad_lse"].T[..., None], tokens)[..., 0]
        if self.strict:
            arrays = {name: array.astype(p.work) for name, array in arrays.items()}
        if "sinks" in p.arrays:
            arrays["sinks"] = p.arrays["sinks"]
        offsets = numpy.array([*map(p.offset, range(len(p.sequences))), 0])
        distance = (offsets[queries[..., 0]] + queries[..., 1])[:, :, None] - keys[:, None, :, 1]
        visible = (queries[:, :, None, 0] == keys[:, None, :, 0]) & self._near(p, distance + self.shift)
        if "alibi_slopes" in p.arrays:
            bias = -p.arrays["alibi_slopes"].reshape(1, -1, 1, 1) * abs(distance)[:, None].astype(p.work)
            arrays["bias"] = bias if self.narrow_bias is None else bias.astype(self.narrow_bias).astype(p.work)
        seen = numpy.broadcast_to(visible[:, None], (*arrays["query"].shape[:3], slots.shape[1]))
        numbers = {name: p.options[name] for name in ("scale", "softcap") if name in p.options}
        dtype = "float32" if self.strict else p.dtype
        return Problem(dtype, p.regime, arrays, numbers, self.other_pairs(seen.copy()), unrounded=True)

    def _near(self, p: PackedProblem, distance: numpy.ndarray) -> numpy.ndarray:
        """Mark the pairs that causal and the window leave visible."""
        near = (distance >= 0) | (not p.options.get("causal", False))
        left, right = p.options.get("window", (None, None))
        near &= True if left is None else distance <= left
        return near & (True if right is None else distance >= -right)

    def _rows(self, p: PackedProblem, parts: list[tuple[numpy.ndarray, Results]]) -> Results:
        tokens, heads, _ = p.arrays["query"].shape
        output = numpy.zeros((tokens, heads, p.arrays["value"].shape[-1]), p.arrays["query"].dtype)
        lse = numpy.full((heads, tokens), -numpy.inf, p.work)
        for queries, results in parts:
            place = queries[..., 2]
            output[place[place >= 0]] = results["output"].swapaxes(1, 2)[place >= 0]
            lse[:, place[place >= 0]] = results["lse"].swapaxes(1, 2)[place >= 0].T
        return {"output": output, "lse": lse}

    def _gradients(self, p: PackedProblem, parts: list[tuple[tuple[numpy.ndarray, numpy.ndarray], Results]]) -> Results:
        """Add the gradients in the type of the sums, and round them once."""
        names = ("query", "key", "value", *(["sinks"] if "sinks" in p.arrays else []))
        whole = {name: numpy.zeros(p.arrays[name].shape, p.work) for name in names}
        for (queries, keys), results in parts:
            for name, places in (("query", queries), ("key", keys), ("value", keys)):
                self._add(whole[name], places[..., 2], results[f"grad_{name}"])
            if "sinks" in whole:
                whole["sinks"] += results["grad_sinks"]
        return {f"grad_{name}": array.astype(p.arrays[name].dtype) for name, array in whole.items()}

    def _add(self, whole: numpy.ndarray, places: numpy.ndarray, gradient: numpy.ndarray) -> None:
        rows = whole.reshape(-1, *whole.shape[-2:])
        numpy.add.at(rows, places[places >= 0], gradient.swapaxes(1, 2)[places >= 0])
        if self.narrow_sums is not None:
            rows[:] = rows.astype(self.narrow_sums)


def _taken(rows: numpy.ndarray, places: numpy.ndarray) -> numpy.ndarray:
    """Take rows (n, heads, size) at places (batch, length), with axes (batch, heads, length, size); padding is 0."""
    if not len(rows):
        return numpy.zeros((places.shape[0], rows.shape[1], places.shape[1], rows.shape[2]), rows.dtype)
    return numpy.where((places >= 0)[..., None, None], rows[places], 0).astype(rows.dtype).swapaxes(1, 2)


def separate(p: PackedProblem) -> list[list[list[int]]]:
    """Each sequence is a problem."""
    return [[[b]] for b in range(len(p.sequences))]


def joined(p: PackedProblem) -> list[list[list[int]]]:
    """All sequences are one problem, and pairs of two sequences are hidden."""
    return [[list(range(len(p.sequences)))]]


def padded(p: PackedProblem) -> list[list[list[int]]]:
    """All sequences are a batch, as long as the longest one."""
    return [[[b] for b in range(len(p.sequences))]]


def by_torch(function: str, problem: Problem) -> Results:
    """Answer with the formula in PyTorch, and with its automatic gradients."""
    return TorchFormula().forward(problem) if function == "attention" else TorchFormula().backward(problem)


def honest(number: int, p: PackedProblem) -> dict[str, Implementation]:
    """Return the implementations of a problem; the forms of dense attention take turns from problem to problem."""
    forms = [with_form(DENSE[(3 * number + i) % len(DENSE)], number + i) for i in range(3)]
    packings = dict(zip(PACKINGS, forms, strict=True))
    implementations = {
        name: Implementation(Packing(PACKINGS[name], form.answer), form.profile) for name, form in packings.items()
    }
    in_torch = Packing(separate, by_torch, strict=True)
    if all(map(every_row_sees, in_torch.problems(p))):
        implementations["PyTorch, a sequence at a time"] = Implementation(in_torch, "strict")
    return implementations


PACKINGS = {"a sequence at a time": separate, "all pairs, some hidden": joined, "a padded batch": padded}
DENSE = (*VARIANTS, *(kernel for kernel in KERNELS if kernel.exponential is not cubic_exp2_of_difference))


def draw_packed(rng: numpy.random.Generator, dtype: str) -> PackedProblem:
    """Draw sequences of any lengths, packed or in blocks that begin alike, and each option in some calls."""
    heads, kv_heads = HEADS[rng.choice(len(HEADS))]
    size, v_dim = SIZES[rng.choice(len(SIZES))]
    q_lengths, kv_lengths = rng.choice(LENGTHS, (2, rng.integers(1, 5)))
    regime = str(rng.choice(list(REGIMES)))
    slots = int(kv_lengths.sum()) + 2
    arrays, options = _positions(rng, q_lengths, kv_lengths)
    tokens = int(q_lengths.sum()) + 2
    arrays |= _vectors(rng, dtype, regime, tokens, slots, (heads, kv_heads), (size, v_dim))
    if rng.random() < 0.5:
        _put_in_blocks(rng, arrays, kv_lengths)
    if rng.random() < 0.4:
        arrays["sinks"] = (2 * rng.standard_normal(heads)).astype("float32")
    if rng.random() < 0.4:
        arrays["alibi_slopes"] = (2.0 ** -rng.uniform(0, 8, heads)).astype("float32")
        options.setdefault("q_offset", "lower_right")
    if rng.random() < 0.4:
        options["softcap"] = float(rng.choice([5, 30]))
    return PackedProblem(dtype, arrays, options, "varlen_attention_vjp", regime)


def _positions(rng: numpy.random.Generator, q_lengths: Any, kv_lengths: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the bounds of the sequences, and the options that compare positions."""
    ends = {"cu_seqlens_q": q_lengths, "cu_seqlens_kv": kv_lengths}
    arrays = {name: numpy.concatenate([[0], numpy.cumsum(lengths)]) for name, lengths in ends.items()}
    options: dict[str, Any] = {}
    if rng.random() < 0.6:
        options |= {"causal": True, "q_offset": str(rng.choice(["lower_right", "upper_left"]))}
    if rng.random() < 0.3:
        options |= {"window": (int(rng.integers(1, 40)), None), "q_offset": options.get("q_offset", "lower_right")}
    return arrays, options


def _vectors(
    rng: numpy.random.Generator,
    dtype: str,
    regime: str,
    tokens: int,
    slots: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
) -> dict[str, numpy.ndarray]:
    """Draw the tensors and the cotangents in a regime of data, with tokens in front."""
    shapes = {
        "query": (heads[0], tokens, sizes[0]),
        "key": (heads[1], slots, sizes[0]),
        "value": (heads[1], slots, sizes[1]),
        "grad_output": (heads[0], tokens, sizes[1]),
    }
    x = {name: rng.standard_normal((1, *shape)) for name, shape in shapes.items()}
    REGIMES[regime](rng, x, dtype)
    arrays = {name: array[0].swapaxes(0, 1).astype(stored(dtype)) for name, array in x.items()}
    if rng.random() < 0.5:
        arrays["grad_lse"] = rng.standard_normal((heads[0], tokens)).astype("float32")
    return arrays


def _put_in_blocks(rng: numpy.random.Generator, arrays: dict[str, numpy.ndarray], lengths: numpy.ndarray) -> None:
    """Take the keys of the first slots as blocks, which the sequences share and repeat."""
    size = int(rng.choice([1, 4, 16]))
    blocks = max(arrays["key"].shape[0] // size, 1)
    for name in ("key", "value"):
        rows = numpy.resize(arrays[name], (blocks * size, *arrays[name].shape[1:]))
        arrays[name] = rows.reshape(blocks, size, *rows.shape[1:])
    columns = int(-(-lengths.max() // size))
    arrays["block_table"] = rng.integers(0, blocks, (len(lengths), columns))
    arrays["block_table"][:, :1] = 0
    arrays["seqused_kv"] = lengths
    del arrays["cu_seqlens_kv"]


def planted_problem(seed: int, dtype: str, kind: str) -> PackedProblem:
    """Draw three sequences of 256 keys, "biased" with slopes, or "shared" with 256 sequences of the same 4 keys."""
    rng, shared = numpy.random.default_rng(seed), kind == "shared"
    count, queries, keys, size = (256, 1, 4, 4) if shared else (3, 16, 256, 64)
    slots = keys if shared else count * keys
    arrays = _vectors(rng, dtype, "normal", count * queries, slots, (2, 2), (size, size))
    arrays["cu_seqlens_q"] = queries * numpy.arange(count + 1)
    options: dict[str, Any] = {"causal": True, "q_offset": "lower_right"}
    if shared:
        arrays |= {"block_table": numpy.zeros((count, 1), int), "seqused_kv": numpy.full(count, keys)}
        arrays |= {
            "key": arrays["key"][None],
            "value": arrays["value"][None],
            "grad_output": abs(arrays["grad_output"]),
        }
        return PackedProblem(dtype, arrays, options, "varlen_attention_vjp", kind)
    arrays["query"] = (CONTRAST * arrays["query"].astype("float32")).astype(arrays["query"].dtype)
    arrays["cu_seqlens_kv"] = keys * numpy.arange(count + 1)
    if kind == "biased":
        arrays["alibi_slopes"] = numpy.array([0.1, 0.2], "float32")
    return PackedProblem(dtype, arrays, options, "varlen_attention", kind).forward


def without_a_key(visible: numpy.ndarray) -> numpy.ndarray:
    """Hide key 100 of a sequence."""
    visible[..., 100] = False
    return visible


def beyond_the_bound(visible: numpy.ndarray) -> numpy.ndarray:
    """Show the first key of the second sequence to the first sequence."""
    visible[:, :, :16, 256] = True
    return visible


class HalfScores(Variant):
    """Rounds the scores to 16 bits before the softmax."""

    def _logits(self, problem: Problem) -> tuple[numpy.ndarray, numpy.ndarray | None]:
        scores, tanh = super()._logits(problem)
        return scores.astype(half(problem.dtype)).astype(problem.work), tanh


def planted(dtype: str) -> dict[str, dict[str, Packing]]:
    """Return the mistakes by name, by the kind of problem; each is an implementation of which one part is changed."""
    correct = Packing(separate, Variant("plain").answer)
    return {
        "plain": {
            "diagonal one key too far": replace(correct, shift=1),
            "a key of a sequence is left out": replace(correct, other_pairs=without_a_key),
            "a key of the next sequence": replace(correct, groups=joined, other_pairs=beyond_the_bound),
            "scores in 16 bits": replace(correct, dense=HalfScores("scores in 16 bits").answer),
        },
        "biased": {"linear bias in 16 bits": replace(correct, narrow_bias=half(dtype))},
        "shared": {"gradients of a slot added in 16 bits": replace(correct, narrow_sums=half(dtype))},
    }


def try_packed(dtype: str, first: int, count: int) -> Shares:
    """Ask random problems of a dtype, forward and backward, and plant each mistake in some problems."""
    shares = Shares("a packed call")
    for number in range(first, first + count):
        p = draw_packed(numpy.random.default_rng([number, *dtype.encode()]), dtype)
        shares.judge(p.forward, honest(number, p))
        if not overflows(bounds(p.function, p.arrays, p.options).values, dtype):
            shares.judge(p, honest(number, p))
    for number in range(first, first + PLANTED_PROBLEMS):
        for kind, mistakes in planted(dtype).items():
            shares.plant(planted_problem(number, dtype, kind), mistakes)
    return shares
