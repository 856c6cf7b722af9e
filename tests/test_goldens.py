"""The stored goldens, their loader, and the program that writes them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import operator
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import generate
import ml_dtypes
import numpy
import pytest
from catalogue import descriptions
from description import Description, Input
from portable import generate as write_generated
from storage import smallest

from mha_spec_conformance.suite import cases
from mha_spec_conformance.suite.cases import GoldensError, load
from mha_spec_conformance.suite.portable import KINDS, generated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mha_spec_conformance.suite.cases import Suite

REPOSITORY = Path(__file__).parent.parent
GENERATOR = {"seed": 5, "kind": "bell", "unit": 0.125}


def _describe(name: str, function: str = "attention", **inputs: Input) -> Description:
    query = Input(numpy.arange(-15.0, 15).reshape(1, 2, 3, 5) / 8)
    key = Input(numpy.arange(-35.0, 35).reshape(1, 2, 7, 5) / 16)
    tensors = {"query": query, "key": key, "value": key}
    return Description(f"{function}/{name}", "A case.", function, ("MHA-SCORE-1",), ("core",), {**tensors, **inputs})


def _handful() -> list[Description]:
    mask = Input(numpy.arange(21).reshape(1, 1, 3, 7) % 4 > 0, "bool")
    bias = Input(numpy.where(numpy.arange(7) == 2, -numpy.inf, 0.5).reshape(1, 1, 1, 7), "float32")
    spoilt = Input(numpy.where(numpy.arange(70) == 4, numpy.nan, 1.0).reshape(1, 2, 7, 5))
    refused = {"error": {"argument": "scale", "kind": "value"}, "options": {"scale": float("nan"), "window": (2, None)}}
    return [
        _describe("plain"),
        _describe("masked", mask=mask, bias=bias),
        _describe("spoilt", value=spoilt),
        _describe("generated", value=Input(write_generated((1, 2, 7, 5), **GENERATOR), generator=GENERATOR)),
        _describe("gradients", "attention_vjp", grad_output=_describe("plain").inputs["query"]),
        dataclasses.replace(_describe("sampled"), sampled_rows=2),
        dataclasses.replace(_describe("refused"), **refused),
    ]


@pytest.fixture(scope="session")
def files() -> dict[str, bytes]:
    built, refusals = generate.build(_handful())
    assert not refusals
    return built


@pytest.fixture
def folder(files: dict[str, bytes], tmp_path: Path) -> Path:
    generate.write(tmp_path, files)
    return tmp_path


def _edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    """Change the index and its sha256."""
    index = json.loads((folder / "index.json").read_bytes())
    edit(index)
    data = json.dumps(index).encode()
    (folder / "index.json").write_bytes(data)
    (folder / "index.json.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  index.json\n")


# The stored goldens.


def test_the_suite_has_many_cases_in_few_bytes(suite: Suite) -> None:
    folder = cases.FOLDER
    assert len(suite.cases) >= 600
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20_000_000


def test_a_compiled_target_compiles_few_times(suite: Suite) -> None:
    """A target compiles for each signature in each dtype; docs/cases.md says how often.

    alibi_slopes is not counted, because it has no array input, so that nothing is compiled for it.
    """
    compiled = {
        (case.signature, dtype)
        for case in suite.cases
        if case.expect == "values" and case.function != "alibi_slopes"
        for dtype in case.dtypes
    }
    assert len(compiled) <= 2200
    assert sum(dtype == "float32" for _, dtype in compiled) <= 850


def test_index_holds_the_catalogue(suite: Suite) -> None:
    assert [case.id for case in suite.cases] == sorted(description.id for description in descriptions())


def test_a_sample_of_the_goldens_is_what_the_generator_writes(suite: Suite) -> None:
    stored = {case.id: case for case in suite.cases}
    for description in sorted(descriptions(), key=lambda description: description.id)[::23]:
        case, answers = stored[description.id], generate.answer(description)
        assert not isinstance(answers, str)
        assert case.expected.keys() == answers.keys()
        for name, answer in answers.items():
            expected = case.expected[name]
            assert expected.shape == answer.shape
            for part in ("values", "kinds", "rows"):
                numpy.testing.assert_array_equal(
                    getattr(expected, part), getattr(answer, part), err_msg=f"{case.id} {name} {part}", strict=True
                )


def test_every_input_is_exact_in_every_dtype(suite: Suite) -> None:
    for case in suite.cases:
        if case.expect == "values":
            wide = case.inputs("float64")
            for dtype in case.dtypes:
                for name, array in case.inputs(dtype).items():
                    if case.input_entries[name]["dtype"] == "case":
                        numpy.testing.assert_array_equal(array.astype(numpy.float64), wide[name], err_msg=case.id)


def test_no_expected_value_is_a_negative_zero(suite: Suite) -> None:
    for case in suite.cases:
        for expected in case.expected.values():
            assert not numpy.any((expected.values == 0) & numpy.signbit(expected.values))


# The loader.


def test_the_loader_reads_what_the_generator_writes(folder: Path, files: dict[str, bytes]) -> None:
    suite = load(folder)
    assert suite.goldens_sha256 == hashlib.sha256(files["index.json"]).hexdigest()
    assert [case.id for case in suite.cases] == sorted(description.id for description in _handful())
    for case, description in zip(suite.cases, sorted(_handful(), key=lambda d: d.id), strict=True):
        arrays = case.inputs("float64")
        assert arrays.keys() == description.inputs.keys()
        for name, item in description.inputs.items():
            wanted = item.values if item.dtype == "case" else item.values.astype(item.dtype)
            numpy.testing.assert_array_equal(arrays[name], wanted, strict=True)
        for name in ("title", "function", "clauses", "features", "level", "tags", "dtypes"):
            assert getattr(case, name) == getattr(description, name)


def test_options_are_python_values(folder: Path) -> None:
    (case,) = (case for case in load(folder).cases if case.expect == "error")
    assert numpy.isnan(case.options["scale"])
    assert case.options["window"] == (2, None)
    assert case.error == {"argument": "scale", "kind": "value"}
    assert not case.expected


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_inputs_have_the_dtype_of_the_run(dtype: str, folder: Path) -> None:
    by_id = {case.id: case for case in load(folder).cases}
    arrays = by_id["attention/masked"].inputs(dtype)
    assert arrays["query"].dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else numpy.dtype(dtype))
    assert arrays["bias"].dtype == numpy.float32
    assert arrays["mask"].dtype == bool


def test_inputs_are_fresh_and_goldens_cannot_be_written_to(folder: Path) -> None:
    case = load(folder).cases[0]
    case.inputs("float64")["query"][:] = 7
    assert not (case.inputs("float64")["query"] == 7).any()
    with pytest.raises(ValueError, match="read-only"):
        next(iter(case.expected.values())).values[:] = 7


def test_sampled_rows_equal_those_of_the_whole_output(folder: Path) -> None:
    by_id = {case.id: case for case in load(folder).cases}
    whole, sampled = by_id["attention/plain"].expected["output"], by_id["attention/sampled"].expected["output"]
    assert sampled.rows is not None
    assert {0, 5} <= set(sampled.rows.tolist())
    assert sampled.shape == whole.shape
    numpy.testing.assert_array_equal(sampled.values, whole.values.reshape(-1, 5)[sampled.rows], strict=True)


def test_a_missing_file_is_named(folder: Path, files: dict[str, bytes]) -> None:
    for name in files:
        generate.write(folder, files)
        (folder / name).unlink()
        with pytest.raises(GoldensError, match=rf"^{re.escape(name)}: cannot be read"):
            load(folder)


def test_a_changed_byte_is_refused_by_name(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        generate.write(folder, files)
        middle = len(data) // 2
        (folder / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        blamed = "index.json" if name == "index.json.sha256" and middle < 64 else name
        with pytest.raises(GoldensError, match=rf"^{re.escape(blamed)}: damaged"):
            load(folder)


def test_a_truncated_file_is_refused_by_name(folder: Path, files: dict[str, bytes]) -> None:
    for name in files.keys() - {"index.json.sha256"}:
        generate.write(folder, files)
        (folder / name).write_bytes(files[name][:-9])
        with pytest.raises(GoldensError, match=rf"^{re.escape(name)}: damaged"):
            load(folder)


def test_a_file_that_is_not_safetensors_is_refused_by_name(folder: Path) -> None:
    name = next(folder.glob("tensors-*")).name
    (folder / name).write_bytes(b"nothing")
    entry = {"sha256": hashlib.sha256(b"nothing").hexdigest(), "bytes": 7}
    _edit_index(folder, lambda index: index["files"].update({name: entry}))
    with pytest.raises(GoldensError, match=f"^{name}: the suite cannot read it as a safetensors file"):
        load(folder)


@pytest.mark.parametrize(("member", "value"), [("format", "mha-spec-goldens/2"), ("spec_version", "0.9")])
def test_another_version_is_refused(member: str, value: str, folder: Path) -> None:
    _edit_index(folder, lambda index: index.update({member: value}))
    with pytest.raises(GoldensError, match=f"^index.json: `{member}` must be {member}=.*received {member}={value}"):
        load(folder)


def test_an_index_that_is_not_json_is_refused(folder: Path) -> None:
    data = (folder / "index.json").read_bytes()[:-20]
    (folder / "index.json").write_bytes(data)
    (folder / "index.json.sha256").write_text(hashlib.sha256(data).hexdigest())
    with pytest.raises(GoldensError, match=r"^index.json: damaged, it is not JSON"):
        load(folder)


@pytest.mark.parametrize("member", ["files", "cases", "suite_version"])
def test_an_index_without_a_member_is_refused(member: str, folder: Path) -> None:
    _edit_index(folder, lambda index: index.pop(member))
    with pytest.raises(GoldensError, match=f"`{member}` is missing"):
        load(folder)


def _repeat(index: dict) -> None:
    index["cases"].append(index["cases"][0])


def _drop_title(index: dict) -> None:
    del index["cases"][0]["title"]


def _drop_shape(index: dict) -> None:
    del index["cases"][0]["inputs"]["query"]["shape"]


def _name_another_tensor(index: dict) -> None:
    index["cases"][0]["inputs"]["query"]["tensor"] = "0123456789abcdef"


def _name_other_kinds(index: dict) -> None:
    (case,) = (case for case in index["cases"] if case["id"] == "attention/spoilt")
    case["outputs"]["output"]["kinds"]["tensor"] = "0123456789abcdef"


def _name_other_parameters(index: dict) -> None:
    index["cases"][0]["parameters"] = "01234567"


def _change_shape(index: dict) -> None:
    index["cases"][0]["outputs"]["lse"]["shape"] = [1, 2, 4]


def _change_kind(index: dict) -> None:
    index["cases"][0]["inputs"]["value"]["generator"]["kind"] = "noise"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_repeat, "two cases have the id attention/generated"),
        (_drop_title, "case attention/generated: title is missing"),
        (_drop_shape, "`query`: `shape` must be a list of sizes, received shape=None"),
        (_name_another_tensor, "`query` names tensor 0123456789abcdef, which tensors-.* does not have"),
        (_name_other_kinds, "`output` names tensor 0123456789abcdef"),
        (_name_other_parameters, "case attention/generated names the parameters 01234567, which do not exist"),
        (_change_shape, "`lse` must have shape=.1, 2, 4., its tensor has shape=.1, 2, 3."),
        (_change_kind, "the kind of its generator must be one of bell, contrast, full"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(edit: Callable[[dict], object], message: str, folder: Path) -> None:
    _edit_index(folder, edit)
    with pytest.raises(GoldensError, match=rf"^index.json: .*{message}"):
        load(folder)


OF_OTHER_TYPES = (None, True, -1, 7, 1.5, "text", [], [None], {}, {"a": 1}, {"number": "one"})


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every member of the index, except those of tensors and long lists that repeat a form."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


def _can_be_used(folder: Path) -> bool:
    """Read all cases with their arrays, and tell whether the goldens are accepted."""
    try:
        for case in load(folder).cases:
            assert case.signature
            assert case.expected.keys() == case.output_entries.keys()
            assert all(case.inputs(dtype).keys() == case.input_entries.keys() for dtype in case.dtypes)
    except GoldensError:
        return False
    return True


def test_values_of_other_types_are_refused_or_read_without_an_error(folder: Path) -> None:
    """The checksums match, so that only the form of an entry can be wrong."""
    index = json.loads((folder / "index.json").read_text())
    refused = 0
    for path in list(_paths(index))[1:]:
        for value in OF_OTHER_TYPES:
            changed = copy.deepcopy(index)
            parent = functools.reduce(operator.getitem, path[:-1], changed)
            parent[path[-1]] = value
            _edit_index(folder, lambda target, changed=changed: (target.clear(), target.update(changed)))
            refused += not _can_be_used(folder)
    assert refused > 1000


def test_a_generator_that_gives_other_values_is_refused(folder: Path) -> None:
    _edit_index(folder, lambda index: index["cases"][0]["inputs"]["value"]["generator"].update(seed=6))
    (case,) = (case for case in load(folder).cases if case.id == "attention/generated")
    with pytest.raises(GoldensError, match="attention/generated: the generator of input `value`"):
        case.inputs("float32")


# The program that writes them.


def test_the_bytes_depend_only_on_the_cases(files: dict[str, bytes]) -> None:
    again, _ = generate.build(_handful()[::-1])
    assert again == files


def test_equal_tensors_are_stored_once(files: dict[str, bytes]) -> None:
    index = json.loads(files["index.json"])
    places = {case["inputs"]["query"].get("tensor") for case in index["cases"]}
    assert len(places) == 1


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, -0.0, numpy.inf, numpy.nan], "bfloat16"),
        ([1 + 2**-10], "float16"),
        ([1 + 2**-20], "float32"),
        ([0.1], "float64"),
    ],
)
def test_values_are_stored_in_the_smallest_type_that_holds_them(values: list[float], dtype: str) -> None:
    stored = smallest(numpy.asarray(values))
    assert stored.dtype.name == dtype
    back = stored.astype(numpy.float64)
    numpy.testing.assert_array_equal(back, values)
    numpy.testing.assert_array_equal(numpy.signbit(back), numpy.signbit(values))


def test_check_finds_the_first_difference(folder: Path, files: dict[str, bytes]) -> None:
    assert generate.difference(folder, files) is None
    value = Input(_describe("plain").inputs["value"].values + 1)
    changed, _ = generate.build(
        [_describe("plain", value=value) if d.id == "attention/plain" else d for d in _handful()]
    )
    assert "case attention/plain" in str(generate.difference(folder, changed))
    next(folder.glob("tensors-*")).unlink()
    assert "is missing" in str(generate.difference(folder, files))


def test_two_cases_of_one_id_are_refused() -> None:
    _, refusals = generate.build([_describe("plain"), _describe("plain")])
    assert refusals == ["attention/plain: two cases have this id"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Input(numpy.full((1, 2, 7, 5), 1 + 2**-9)), "`value` is not exact in bfloat16"),
        (Input(numpy.full((1, 2, 7, 5), 2.0**20)), "`value` is not exact in float16"),
        (Input(numpy.zeros((1, 2, 7, 5)), generator=GENERATOR), "the generator of `value` does not give its values"),
    ],
)
def test_an_input_that_a_run_cannot_hold_is_refused(item: Input, message: str) -> None:
    _, (refusal,) = generate.build([_describe("plain", value=item)])
    assert refusal == f"attention/plain: {message}"


def test_the_generator_notices_imports_of_the_code_that_it_checks() -> None:
    assert "mha_spec_conformance.suite.cases" in str(generate.problem_of({}, []))


def test_the_generator_imports_nothing_of_mha_spec() -> None:
    hidden = "import sys; sys.modules['mha_spec'] = sys.modules['mha_spec_conformance'] = None"
    code = f"{hidden}; sys.path.insert(0, {str(REPOSITORY / 'conformance' / 'generator')!r}); import generate"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mha_spec")]:
        monkeypatch.delitem(sys.modules, name)
    assert generate.problem_of({"a": bytes(10)}, []) is None
    assert "at most 20000000" in str(generate.problem_of({"a": bytes(20_000_001)}, []))


# Generated inputs: three independent programs.

SHAPE = (2, 7, 11)
KINDS_IN_C = {"bits": "i"}
MEMBERS: tuple[dict[str, Any], ...] = (
    {"kind": "bell", "unit": 0.25},
    {"kind": "bell", "unit": 0.25, "mean": 1.5, "levels": 3},
    {"kind": "bell", "unit": 0.125, "hidden": 64},
    {"kind": "contrast", "unit": 0.25},
    {"kind": "full", "unit": 0.25},
    {"kind": "full", "unit": 0.25, "bits": 53},
    {"kind": "bits", "share": 168},
    {"kind": "tiles", "tile": 3},
)
SETTINGS = [members | {"seed": seed} for members in MEMBERS for seed in (0, 7, 2**64 - 1)]


@pytest.mark.parametrize("members", SETTINGS)
def test_writer_and_reader_generate_the_same(members: dict[str, Any]) -> None:
    assert members["kind"] in KINDS
    values = generated(SHAPE, **members)
    numpy.testing.assert_array_equal(values, write_generated(SHAPE, **members), strict=True)
    assert len(numpy.unique(values)) > 1


def test_every_kind_is_generated_by_every_program() -> None:
    assert {members["kind"] for members in MEMBERS} == {*KINDS}


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_c_program_of_the_format_document_generates_the_same(tmp_path: Path) -> None:
    document = (REPOSITORY / "docs" / "goldens.md").read_text()
    program = re.search(r"```c\n(.*?)```", document, re.DOTALL)
    assert program
    source = f"#include <stdio.h>\n{program[1]}\nint main(void) {{ {''.join(map(_printed, SETTINGS))} return 0; }}"
    (tmp_path / "element.c").write_text(source)
    subprocess.run(
        ["cc", "-Wall", "-Wno-parentheses", "-Werror", "-o", tmp_path / "element", tmp_path / "element.c"], check=True
    )
    printed = subprocess.run([tmp_path / "element"], capture_output=True, text=True, check=True).stdout
    values = numpy.asarray([float.fromhex(line) for line in printed.split()])
    wanted = [generated(SHAPE, **members).ravel() for members in SETTINGS]
    numpy.testing.assert_array_equal(values, numpy.concatenate(wanted), strict=True)


def _printed(members: dict[str, Any]) -> str:
    """Return a loop of C that prints every element of a generator."""
    generator = {"unit": 1, "bits": 8, "tile": 1, **members, "seed": f"{members['seed']}u"}
    generator["kind"] = f"'{KINDS_IN_C.get(members['kind'], members['kind'][0])}'"
    fields = ", ".join(f".{name} = {value}" for name, value in generator.items())
    rows, columns = SHAPE[-2:]
    element = f"element((struct generator){{{fields}}}, {rows}, {columns}, n)"
    return f'for (uint64_t n = 0; n < {numpy.prod(SHAPE)}; n++) printf("%a\\n", {element});\n'
