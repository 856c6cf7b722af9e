from __future__ import annotations

import importlib
import itertools
import math
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import ModuleType

    from oracle import Answer

    from mha_spec_conformance.suite.cases import Case, Suite

pytest.register_assert_rewrite("support")


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a fresh interpreter, with further environment variables, away from the tree."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MHA_SPEC", "PYTHON"))}
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(
            command, env=clean | environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
def attention_module(request: pytest.FixtureRequest) -> ModuleType:
    """The specification's functions: as the reference, a backend, and the public face have them."""
    return importlib.import_module(request.param)


@pytest.fixture
def quiet() -> Iterator[None]:
    """What torch's own compiler warns of is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def double() -> Iterator[None]:
    """Float64 is asked for in JAX."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """A program of XLA that runs once is not worth optimizing."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def ask_oracle() -> Callable[..., dict[str, Answer]]:
    """Give the goldens' expected values of a function, its arrays by name and its plain options."""
    from description import Description, Input
    from oracle import expect

    def ask(
        function: str, arrays: Mapping[str, numpy.ndarray], sampled_rows: int | None = None, **options: Any
    ) -> dict[str, Answer]:
        inputs = {name: Input(numpy.asarray(array)) for name, array in arrays.items()}
        return expect(Description("case", "", function, (), (), inputs, options, sampled_rows=sampled_rows))

    return ask


@pytest.fixture(scope="session")
def suite() -> Suite:
    """The cases of the suite."""
    from mha_spec_conformance.suite.cases import load

    return load()


@pytest.fixture(scope="session")
def smallest_first(suite: Suite) -> tuple[Case, ...]:
    """The cases of the suite by the size of their inputs."""
    return tuple(
        sorted(suite.cases, key=lambda case: sum(array.size for array in case.inputs(case.dtypes[0]).values()))
    )


@dataclass(frozen=True, slots=True)
class Bounded:
    """A number, and how far from it any other evaluation may lie that rounds to `unit` after every operation.

    Sums may be taken in any order: n terms are n roundings deep. Functions may be wrong by 4 units in the last place.
    """

    value: float
    error: float = 0.0
    unit: float = 2.0**-53

    def __mul__(self, other: Bounded) -> Bounded:
        error = abs(self.value) * other.error + abs(other.value) * self.error + self.error * other.error
        return self.rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient, least = self.value / other.value, abs(other.value) - other.error
        return self.rounded(quotient, (self.error + abs(quotient) * other.error) / least)

    def rounded(self, value: float, error: float, roundings: int = 1) -> Bounded:
        return Bounded(value, error + roundings * self.unit * (abs(value) + error), self.unit)

    def exp(self, less: float = 0.0) -> Bounded:
        value = math.exp(self.value - less)
        error = self.error + 2 * self.unit * (abs(self.value) + abs(less))
        return self.rounded(value, value * math.expm1(error), 8)

    def root(self) -> Bounded:
        return self.rounded(math.sqrt(self.value), self.error / math.sqrt(self.value - self.error), 2)


def total(terms: Iterable[Bounded]) -> Bounded:
    """The sum of numbers in any order."""
    given = list(terms)
    magnitude = math.fsum(abs(one.value) + one.error for one in given)
    unit = given[0].unit if given else 0.0
    error = math.fsum(one.error for one in given) + len(given) * unit * magnitude
    return Bounded(math.fsum(one.value for one in given), error, unit)


class LayerByLoops:
    """The layer, written a second time: number by number, with a bound of the error of each.

    Every operation rounds to `unit`, and what lies between the steps of the layer to `stored` as well.
    """

    def __init__(
        self, params: Mapping[str, numpy.ndarray], unit: float = 2.0**-53, stored: float | None = None
    ) -> None:
        self.params, self.unit, self.stored = params, unit, unit if stored is None else stored

    def number(self, x: Any) -> Bounded:
        return Bounded(float(x), 0.0, self.unit)

    def store(self, x: Bounded) -> Bounded:
        return Bounded(x.value, x.error + self.stored * (abs(x.value) + x.error), self.unit)

    def head(self, token: numpy.ndarray, name: str, head: int) -> list[Bounded]:
        """One head of one token: projected, then biased."""
        weight, bias = self.params[f"w_{name}"], self.params.get(f"b_{name}")
        found = []
        for c in range(weight.shape[2]):
            terms = [self.number(token[e]) * self.number(weight[e, head, c]) for e in range(weight.shape[0])]
            one = self.store(total(terms))
            found.append(one if bias is None else self.store(total([one, self.number(bias[head, c])])))
        return found

    def normalised(self, x: list[Bounded], name: str, epsilon: float) -> list[Bounded]:
        gain = self.params.get(name)
        if gain is None:
            return x
        mean = total(one * one for one in x) / self.number(len(x))
        root = total([mean, self.number(epsilon)]).root()
        return [self.store(one / root * self.number(gain[c])) for c, one in enumerate(x)]

    def turned(
        self,
        x: list[Bounded],
        position: float,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int | None = None,
    ) -> list[Bounded]:
        """One head of one token, its pairs turned one after another."""
        size = len(x) if rotary_dim is None else rotary_dim
        found = list(x)
        for i in range(size // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + size // 2)
            angle = position * base ** (-2 * i / size)
            error = self.unit * (abs(angle) * (10 + abs(math.log(base)) * 2 * i / size) + 8)
            cosine, sine, minus = (
                Bounded(turn, error, self.unit) for turn in (math.cos(angle), math.sin(angle), -math.sin(angle))
            )
            found[first] = self.store(total([x[first] * cosine, x[second] * minus]))
            found[second] = self.store(total([x[second] * cosine, x[first] * sine]))
        return found

    def weights(
        self, q: list[Bounded], keys: Sequence[list[Bounded]], bias: Sequence[float], sink: float | None
    ) -> list[Bounded]:
        """The weights of one row over the keys that it sees."""
        scale = self.number(1.0) / self.number(len(q)).root()
        logits = [
            total([total(one * other for one, other in zip(q, key, strict=True)) * scale, self.number(b)])
            for key, b in zip(keys, bias, strict=True)
        ]
        sinks = [] if sink is None else [self.number(sink)]
        anchor = max(one.value for one in logits + sinks) if logits else 0.0
        exponentials = [one.exp(anchor) for one in logits + sinks]
        whole = total(exponentials)
        return [one / whole for one in exponentials[: len(logits)]]

    def __call__(
        self,
        query: numpy.ndarray,
        key: numpy.ndarray,
        value: numpy.ndarray,
        visible: numpy.ndarray,
        *,
        bias: numpy.ndarray | None = None,
        sinks: numpy.ndarray | None = None,
        rotary: Mapping[str, Any] | None = None,
        q_positions: numpy.ndarray | None = None,
        norm_epsilon: float = 1e-6,
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The output and its errors; `visible` and `bias` are (batch, heads, q_len, kv_len)."""
        batch, heads, q_len, kv_len = visible.shape
        group, v_dim, out = heads // self.params["w_k"].shape[1], *self.params["w_o"].shape[1:]
        attended = numpy.empty((batch, q_len, heads, v_dim), dtype=object)
        for b, h in itertools.product(range(batch), range(heads)):
            keys, values = (
                [self.head(x[b, j], name, h // group) for j in range(kv_len)] for name, x in (("k", key), ("v", value))
            )
            keys = [self.normalised(one, "k_norm", norm_epsilon) for one in keys]
            if rotary is not None:
                keys = [self.turned(one, j, **rotary) for j, one in enumerate(keys)]
            for i in range(q_len):
                q = self.normalised(self.head(query[b, i], "q", h), "q_norm", norm_epsilon)
                if rotary is not None:
                    q = self.turned(q, i if q_positions is None else q_positions[b, i], **rotary)
                seen = [j for j in range(kv_len) if visible[b, h, i, j]]
                added = [0.0 if bias is None else bias[b, h, i, j] for j in seen]
                weights = self.weights(q, [keys[j] for j in seen], added, None if sinks is None else sinks[h])
                for c in range(v_dim):
                    terms = [w * values[j][c] for w, j in zip(weights, seen, strict=True)]
                    attended[b, i, h, c] = self.store(total(terms))
        return self.projected(attended, out)

    def projected(self, attended: numpy.ndarray, out: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """All heads of each token, projected and biased."""
        batch, q_len, heads, v_dim = attended.shape
        output, error = numpy.zeros((2, batch, q_len, out))
        for b, i, o in numpy.ndindex(output.shape):
            weight = self.params["w_o"][:, :, o]
            terms = [attended[b, i, h, c] * self.number(weight[h, c]) for h, c in numpy.ndindex(heads, v_dim)]
            found = self.store(total(terms))
            if "b_o" in self.params:
                found = self.store(total([found, self.number(self.params["b_o"][o])]))
            output[b, i, o], error[b, i, o] = found.value, found.error
        return output, error


@pytest.fixture
def layer_by_loops() -> type[LayerByLoops]:
    """The layer written a second time, with bounds."""
    return LayerByLoops
