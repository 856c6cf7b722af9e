"""The cases of the suite and their goldens, read from the files that docs/goldens.md describes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy
from safetensors import SafetensorError, deserialize

from mha_spec import SPEC_VERSION
from mha_spec.arrays import softmax_dtype_name
from mha_spec.errors import MhaSpecError

from .form import wrong_member
from .portable import KINDS, generated

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from mha_spec.arrays import Array

    Entry = Mapping[str, Any]
    Tensors = Mapping[tuple[str, str], Array]

__all__ = ["FORMAT", "Case", "Expected", "GoldensError", "Suite", "load"]

FORMAT = "mha-spec-goldens/1"

FOLDER = Path(__file__).parents[1] / "goldens"

GENERATED_AT_ONCE = 16
"""The number of generated arrays that are kept: those of the last few cases, which share many of them."""

_DTYPES = {
    "BOOL": numpy.dtype(bool),
    "U8": numpy.dtype(numpy.uint8),
    "I32": numpy.dtype("<i4"),
    "I64": numpy.dtype("<i8"),
    "BF16": numpy.dtype(ml_dtypes.bfloat16),
    "F16": numpy.dtype("<f2"),
    "F32": numpy.dtype("<f4"),
    "F64": numpy.dtype("<f8"),
}

_FIELDS = (
    "title",
    "function",
    "clauses",
    "features",
    "level",
    "tags",
    "dtypes",
    "options",
    "inputs",
    "outputs",
    "expect",
)


class GoldensError(MhaSpecError, ValueError):
    """The goldens are missing, damaged, or of another version; the message names the file."""


@dataclass(frozen=True)
class Expected:
    """One expected output, correctly rounded to float64.

    `kinds` is None if every element is finite. `rows` is None if the golden holds all rows; otherwise `values` has the
    shape (len(rows), last axis), and `rows` holds flat indices over all axes of `shape` except the last (for lse: all).
    """

    values: Array
    kinds: Array | None
    rows: Array | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call that the suite tests, with its expected outputs or error, in each of its dtypes.

    `input_entries` and `output_entries` are those of the index by name; `tensors` holds the arrays that they name.
    """

    id: str
    title: str
    function: str
    clauses: tuple[str, ...]
    features: tuple[str, ...]
    level: str
    tags: tuple[str, ...]
    dtypes: tuple[str, ...]
    options: Mapping[str, Any]
    expect: str
    error: Mapping[str, str] | None
    input_entries: Mapping[str, Entry] = field(repr=False, compare=False)
    output_entries: Mapping[str, Entry] = field(repr=False, compare=False)
    tensors: Tensors = field(repr=False, compare=False)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the input arrays, which are not read."""
        return tuple(self.input_entries)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an input array, which is not read."""
        return tuple(self.input_entries[name]["shape"])

    def has_one_input(self, *names: str) -> bool:
        """Tell whether the named inputs are the same array, as query, key and value are in self-attention."""
        entries = [self.input_entries.get(name) for name in names]
        return all(entry is not None and entry == entries[0] for entry in entries)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the input arrays by name, which are not read."""
        return {name: tuple(entry["shape"]) for name, entry in self.input_entries.items()}

    def inputs(self, dtype: str) -> dict[str, Array]:
        """Return new input arrays for a run in `dtype`, by argument name; bfloat16 is the type of ml-dtypes.

        Raises:
            GoldensError: A generated input does not have the sha256 that the index states.
        """
        return {name: self.input(name, dtype) for name in self.input_entries}

    def input(self, name: str, dtype: str) -> Array:
        """Return a new input array for a run in `dtype`; see `inputs`."""
        return self._input(name, self.input_entries[name], dtype)

    def dtype_of(self, name: str, dtype: str) -> str:
        """Return the dtype that an input has in a run in `dtype`."""
        stored: str = self.input_entries[name]["dtype"]
        return {"case": dtype, "softmax": softmax_dtype_name(dtype)}.get(stored, stored)

    def _input(self, name: str, entry: Entry, dtype: str) -> Array:
        wanted = self.dtype_of(name, dtype)
        values = self.tensors[_location(entry)] if "generator" not in entry else self._generated(name, entry)
        with numpy.errstate(all="ignore"):
            return values.astype(ml_dtypes.bfloat16 if wanted == "bfloat16" else numpy.dtype(wanted))

    def _generated(self, name: str, entry: Entry) -> Array:
        values, digest = _generated(tuple(entry["shape"]), tuple(sorted(entry["generator"].items())))
        if digest != entry["sha256"]:
            raise GoldensError(
                f"index.json: case {self.id}: the generator of input `{name}` gives values with another sha256."
            )
        return values

    @cached_property
    def expected(self) -> Mapping[str, Expected]:
        """The expected outputs by name; empty if the case must raise."""
        return {name: self._expected(entry) for name, entry in self.output_entries.items()}

    def _expected(self, entry: Entry) -> Expected:
        kinds, rows = (
            None if entry[name] is None else self.tensors[_location(entry[name])] for name in ("kinds", "rows")
        )
        return Expected(self.tensors[_location(entry)], kinds, rows, tuple(entry["shape"]))

    @property
    def sampled_rows(self) -> Array | None:
        """The rows that the goldens of every output hold, or None if an output is whole."""
        rows = [expected.rows for expected in self.expected.values()]
        return rows[0] if rows and all(chosen is not None for chosen in rows) else None

    @property
    def signature(self) -> Hashable:
        """The key of a compiled program: the function, the shapes and the plain options."""
        shapes = tuple((name, tuple(entry["shape"])) for name, entry in sorted(self.input_entries.items()))
        return self.function, shapes, repr(sorted(self.options.items()))


@lru_cache(maxsize=GENERATED_AT_ONCE)
def _generated(shape: tuple[int, ...], generator: tuple[tuple[str, Any], ...]) -> tuple[Array, str]:
    """Return the values of a generator and their sha256."""
    values = generated(shape, **dict(generator))
    values.flags.writeable = False
    return values, hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Suite:
    """All cases of a version of the suite."""

    cases: tuple[Case, ...]
    version: str
    spec_version: str
    goldens_sha256: str

    @property
    def features(self) -> tuple[str, ...]:
        """The features of all cases, in the order of the suite."""
        return tuple(dict.fromkeys(feature for case in self.cases for feature in case.features))


def load(folder: Path | None = None) -> Suite:
    """Read and verify the goldens of a folder, by default those of this package.

    Raises:
        GoldensError: A file is missing, damaged or of another version, an id occurs twice, or an entry of the index
            names a tensor or parameters that do not exist.
    """
    folder = FOLDER if folder is None else Path(folder)
    data = _read(folder, "index.json")
    digest = hashlib.sha256(data).hexdigest()
    _verify("index.json", digest, _read(folder, "index.json.sha256").decode(errors="replace").partition(" ")[0])
    index = _parse(data)
    try:
        return _suite(_Contents(digest, index, _all_tensors(folder, index)))
    except GoldensError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise GoldensError(f"index.json: an entry does not have the form of {FORMAT}: {error!r}.") from error


@dataclass(frozen=True)
class _Contents:
    """A folder that was read and verified; `digest` is that of the index, which has the sha256 of every other file."""

    digest: str
    index: dict[str, Any] = field(compare=False)
    tensors: Tensors = field(compare=False)


def _all_tensors(folder: Path, index: dict[str, Any]) -> Tensors:
    return {
        location: tensor for name, file in index["files"].items() for location, tensor in _tensors(folder, name, file)
    }


@lru_cache(maxsize=1)
def _suite(contents: _Contents) -> Suite:
    """Make the cases, which takes four fifths of the time of a load, once for the same contents."""
    index = contents.index
    _put_parameters(index)
    cases = tuple(_case(entry, contents.tensors) for entry in index["cases"])
    _refuse_repeated([case.id for case in cases])
    return Suite(cases, index["suite_version"], index["spec_version"], contents.digest)


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise GoldensError(
            f"{name}: cannot be read from {folder}: {error.strerror}. Install the package again."
        ) from error


def _verify(name: str, received: str, expected: str) -> None:
    if received != expected:
        raise GoldensError(
            f"{name}: damaged, must have sha256={expected}, received sha256={received}. Install the package again."
        )


def _parse(data: bytes) -> dict[str, Any]:
    try:
        index = json.loads(data)
    except ValueError as error:
        raise GoldensError(f"index.json: damaged, it is not JSON: {error}.") from error
    for name, wanted in (("format", FORMAT), ("spec_version", SPEC_VERSION)):
        received = index.get(name) if isinstance(index, dict) else None
        if received != wanted:
            raise GoldensError(
                f"index.json: `{name}` must be {name}={wanted}, received {name}={received}. "
                "These goldens belong to another version of the suite."
            )
    for name in ("suite_version", "files", "cases"):
        if name not in index:
            raise GoldensError(f"index.json: `{name}` is missing.")
    return index


def _put_parameters(index: dict[str, Any]) -> None:
    """Give each case the set of parameters that it names, as further inputs."""
    sets: dict[str, Any] = index.get("parameters", {})
    for entry in index["cases"]:
        name = entry.get("parameters")
        if name is not None and name not in sets:
            raise GoldensError(f"index.json: case {entry.get('id')} names the parameters {name}, which do not exist.")
        if name is not None:
            entry["inputs"] |= sets[name]


def _tensors(folder: Path, name: str, entry: Entry) -> list[tuple[tuple[str, str], Array]]:
    data = _read(folder, name)
    if len(data) != entry["bytes"]:
        raise GoldensError(
            f"{name}: damaged, must have bytes={entry['bytes']}, received bytes={len(data)}. Install the package again."
        )
    _verify(name, hashlib.sha256(data).hexdigest(), entry["sha256"])
    try:
        return [((name, tensor), _array(item)) for tensor, item in deserialize(data)]
    except (SafetensorError, KeyError) as error:
        raise GoldensError(f"{name}: the suite cannot read it as a safetensors file: {error}.") from error


def _array(item: Mapping[str, Any]) -> Array:
    array = numpy.frombuffer(item["data"], _DTYPES[item["dtype"]]).reshape(item["shape"])
    array.flags.writeable = False
    return array


def _case(entry: Entry, tensors: Tensors) -> Case:
    name = entry.get("id")
    missing = [key for key in _FIELDS if key not in entry]
    if not isinstance(name, str) or missing:
        raise GoldensError(f"index.json: case {name}: {', '.join(missing) or 'id'} is missing.")
    wrong = wrong_member(entry)
    if wrong is not None:
        raise GoldensError(f"index.json: case {name}: {wrong}.")
    for label, item in (*entry["inputs"].items(), *entry["outputs"].items()):
        _check_entry(f"case {name}: `{label}`", item, tensors)
    clauses, features, tags, dtypes = (tuple(entry[key]) for key in ("clauses", "features", "tags", "dtypes"))
    options = {option: _option(option, value) for option, value in entry["options"].items()}
    return Case(
        id=name,
        title=entry["title"],
        function=entry["function"],
        clauses=clauses,
        features=features,
        level=entry["level"],
        tags=tags,
        dtypes=dtypes,
        options=options,
        expect=entry["expect"],
        error=entry.get("error"),
        input_entries=entry["inputs"],
        output_entries=entry["outputs"],
        tensors=tensors,
    )


def _option(name: str, value: Any) -> Any:
    """Convert an option from JSON: a window becomes a tuple, and {"number": "nan"} a number that JSON lacks."""
    if isinstance(value, dict) and value.keys() == {"number"}:
        return float(value["number"])
    return tuple(value) if name == "window" and isinstance(value, list) else value


def _location(entry: Entry) -> tuple[str, str]:
    return entry["file"], entry["tensor"]


def _check_entry(label: str, entry: Entry, tensors: Tensors) -> None:
    """Raise unless the tensors that an entry names exist and have its shape."""
    if "generator" in entry:
        if entry["generator"].get("kind") not in KINDS:
            raise GoldensError(
                f"index.json: {label}: the kind of its generator must be one of {', '.join(KINDS)}, "
                f"received {entry['generator']}."
            )
        return
    named = [entry, *(entry[key] for key in ("kinds", "rows") if entry.get(key) is not None)]
    for item in named:
        if _location(item) not in tensors:
            raise GoldensError(
                f"index.json: {label} names tensor {item['tensor']}, which {item['file']} does not have."
            )
    shape, received = tuple(entry["shape"]), tensors[_location(entry)].shape
    if entry.get("rows") is not None:
        last = shape[len(shape) - len(received) + 1 :]
        shape = (tensors[_location(entry["rows"])].size, *last)
    if received != shape:
        raise GoldensError(f"index.json: {label} must have shape={shape}, its tensor has shape={received}.")


def _refuse_repeated(ids: list[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise GoldensError(f"index.json: two cases have the id {name}.")
        seen.add(name)
