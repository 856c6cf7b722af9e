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
    from playwright.sync_api import Browser

    from mha_spec_conformance.reporting.matrix import Matrix
    from mha_spec_conformance.suite.cases import Case, Suite

pytest.register_assert_rewrite("support")


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run code in a new interpreter with further environment variables; the source tree is not on its path."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MHA_SPEC", "PYTHON"))}
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(
            command, env=clean | environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


@pytest.fixture(params=["mha_spec.reference", "mha_spec_numpy", "mha_spec"])
def attention_module(request: pytest.FixtureRequest) -> ModuleType:
    """Return the functions of the specification: of the reference, of a backend, and of the public module."""
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Release the programs that JAX compiled for a module: all of them take 7 GiB at the end of a worker."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def quiet() -> Iterator[None]:
    """Ignore warnings; the compiler of torch raises some about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start headless Chromium."""
    from playwright.sync_api import sync_playwright
    from support.pages import CHROMIUM

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Read reports in which each state of the matrix occurs."""
    from support.matrix_reports import field_reports, read

    return read(tmp_path_factory.mktemp("reports"), *field_reports())


@pytest.fixture(scope="module")
def double() -> Iterator[None]:
    """Enable float64 in JAX."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def unoptimized() -> Iterator[None]:
    """Disable most optimizations of XLA, because a program that runs once does not repay them."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def ask_oracle() -> Callable[..., dict[str, Answer]]:
    """Compute expected values as the goldens do, for a function, its arrays by name and its options."""
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
    """Load the suite."""
    from mha_spec_conformance.suite.cases import load

    return load()


@pytest.fixture(scope="session")
def smallest_first(suite: Suite) -> tuple[Case, ...]:
    """Return the cases of the suite in order of the size of their inputs."""
    return tuple(
        sorted(suite.cases, key=lambda case: sum(array.size for array in case.inputs(case.dtypes[0]).values()))
    )


@dataclass(frozen=True, slots=True)
class Bounded:
    """A number with a bound on the error of any evaluation that rounds to `unit` after every operation.

    Sums may be taken in any order, so a sum of n terms counts n roundings. Functions may be wrong by 4 units in the
    last place.
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
    """Add numbers in any order."""
    terms = list(terms)
    magnitude = math.fsum(abs(term.value) + term.error for term in terms)
    unit = terms[0].unit if terms else 0.0
    error = math.fsum(term.error for term in terms) + len(terms) * unit * magnitude
    return Bounded(math.fsum(term.value for term in terms), error, unit)


class LayerByLoops:
    """The layer, written a second time: number by number, each with a bound on its error.

    Every operation rounds to `unit`, and the results of the steps of the layer are also rounded to `stored`.
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
        """Project a token to a head, and add the bias."""
        weight, bias = self.params[f"w_{name}"], self.params.get(f"b_{name}")
        components = []
        for c in range(weight.shape[2]):
            terms = [self.number(token[e]) * self.number(weight[e, head, c]) for e in range(weight.shape[0])]
            component = self.store(total(terms))
            if bias is not None:
                component = self.store(total([component, self.number(bias[head, c])]))
            components.append(component)
        return components

    def normalised(self, x: list[Bounded], name: str, epsilon: float) -> list[Bounded]:
        gain = self.params.get(name)
        if gain is None:
            return x
        mean = total(u * u for u in x) / self.number(len(x))
        root = total([mean, self.number(epsilon)]).root()
        return [self.store(u / root * self.number(gain[c])) for c, u in enumerate(x)]

    def rotated(
        self,
        x: list[Bounded],
        position: float,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        rotary_dim: int | None = None,
    ) -> list[Bounded]:
        """Rotate the pairs of a head of a token."""
        size = len(x) if rotary_dim is None else rotary_dim
        rotated = list(x)
        for i in range(size // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + size // 2)
            angle = position * base ** (-2 * i / size)
            error = self.unit * (abs(angle) * (10 + abs(math.log(base)) * 2 * i / size) + 8)
            cosine, sine, minus = (
                Bounded(turn, error, self.unit) for turn in (math.cos(angle), math.sin(angle), -math.sin(angle))
            )
            rotated[first] = self.store(total([x[first] * cosine, x[second] * minus]))
            rotated[second] = self.store(total([x[second] * cosine, x[first] * sine]))
        return rotated

    def weights(
        self, q: list[Bounded], keys: Sequence[list[Bounded]], bias: Sequence[float], sink: float | None
    ) -> list[Bounded]:
        """Compute the weights of a row over the keys that it sees."""
        scale = self.number(1.0) / self.number(len(q)).root()
        logits = [
            total([total(u * v for u, v in zip(q, key, strict=True)) * scale, self.number(b)])
            for key, b in zip(keys, bias, strict=True)
        ]
        sinks = [] if sink is None else [self.number(sink)]
        anchor = max(logit.value for logit in logits + sinks) if logits else 0.0
        exponentials = [logit.exp(anchor) for logit in logits + sinks]
        denominator = total(exponentials)
        return [exponential / denominator for exponential in exponentials[: len(logits)]]

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
        """Compute the output and its errors; `visible` and `bias` are (batch, heads, q_len, kv_len)."""
        batch, heads, q_len, kv_len = visible.shape
        group, v_dim, out = heads // self.params["w_k"].shape[1], *self.params["w_o"].shape[1:]
        attended = numpy.empty((batch, q_len, heads, v_dim), dtype=object)
        for b, h in itertools.product(range(batch), range(heads)):
            keys, values = (
                [self.head(x[b, j], name, h // group) for j in range(kv_len)] for name, x in (("k", key), ("v", value))
            )
            keys = [self.normalised(k, "k_norm", norm_epsilon) for k in keys]
            if rotary is not None:
                keys = [self.rotated(k, j, **rotary) for j, k in enumerate(keys)]
            for i in range(q_len):
                q = self.normalised(self.head(query[b, i], "q", h), "q_norm", norm_epsilon)
                if rotary is not None:
                    q = self.rotated(q, i if q_positions is None else q_positions[b, i], **rotary)
                seen = [j for j in range(kv_len) if visible[b, h, i, j]]
                added = [0.0 if bias is None else bias[b, h, i, j] for j in seen]
                weights = self.weights(q, [keys[j] for j in seen], added, None if sinks is None else sinks[h])
                for c in range(v_dim):
                    terms = [w * values[j][c] for w, j in zip(weights, seen, strict=True)]
                    attended[b, i, h, c] = self.store(total(terms))
        return self.projected(attended, out)

    def projected(self, attended: numpy.ndarray, out: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Project all heads of each token to the output, and add the bias."""
        batch, q_len, heads, v_dim = attended.shape
        output, error = numpy.zeros((2, batch, q_len, out))
        for b, i, o in numpy.ndindex(output.shape):
            weight = self.params["w_o"][:, :, o]
            terms = [attended[b, i, h, c] * self.number(weight[h, c]) for h, c in numpy.ndindex(heads, v_dim)]
            component = self.store(total(terms))
            if "b_o" in self.params:
                component = self.store(total([component, self.number(self.params["b_o"][o])]))
            output[b, i, o], error[b, i, o] = component.value, component.error
        return output, error


@pytest.fixture
def layer_by_loops() -> type[LayerByLoops]:
    """Return the layer that is written a second time, with bounds."""
    return LayerByLoops
