"""A target is loaded, its claims are read, and a target that cannot be judged is described in one line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from mha_spec_conformance.targets.loading import TargetError, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def restored_path() -> Iterator[None]:
    """Restore the import path and the modules after each test."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("_mha_spec_target_"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a target file and return its path."""

    def write(text: str, name: str = "target.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_keywords_of_the_signature_are_claimed(write: Callable[..., str]) -> None:
    claims = load(write("def attention(query, key, value, mask=None, *, causal=False, return_lse=False): ...")).claims
    assert claims.keywords == {"attention": ("mask", "causal", "return_lse")}
    assert claims.features == ("mask", "causal", "lse")
    assert claims.dtypes == ("float64", "float32")
    assert not claims.registered


def test_open_keywords_claim_only_the_declared_features(write: Callable[..., str]) -> None:
    function = "def attention(query, key, value, **options): ..."
    assert load(write(function)).claims.keywords["attention"] == ()
    claims = load(write(f"features = ('segments',)\n{function}", "declared.py")).claims
    assert claims.keywords["attention"] == ("q_segment_ids", "kv_segment_ids")


def test_unreadable_signature_claims_the_declared_features(write: Callable[..., str]) -> None:
    kernel = "class Kernel:\n    __signature__ = 3\n    def __call__(self, q, k, v, mask=None): ...\n"
    text = f"features = ('mask',)\n{kernel}attention = Kernel()"
    assert load(write(text)).claims.keywords["attention"] == ("mask",)


def test_contents_of_arguments_are_claimed_by_their_names(write: Callable[..., str]) -> None:
    """A signature does not show which norms `params` may hold, or which cache the target takes."""
    function = "def multi_head_attention(query, key, value, params, *, cache=None): ..."
    assert load(write(function)).claims.keywords["multi_head_attention"] == ("cache",)
    claims = load(write(f'features = ("paged_cache", "mask")\n{function}')).claims
    assert claims.keywords["multi_head_attention"] == ("cache", "paged_cache")
    assert {"joint_norm", "paged_cache", "window_cache"} <= set(load("numpy").claims.features)


def test_feature_needs_all_of_its_keywords(write: Callable[..., str]) -> None:
    claims = load(write("def attention(query, key, value, q_segment_ids=None): ...")).claims
    assert "segments" not in claims.features


def test_other_functions_of_the_file_are_claimed_by_their_names(write: Callable[..., str]) -> None:
    path = write("def mine(q, k, v): ...\ndef attention(q, k, v, mask): ...\ndef merge_attention(a, b, c, d): ...")
    target = load(f"{path}:mine")
    assert target.functions["attention"].__name__ == "mine"
    assert set(target.functions) == {"attention", "merge_attention"}
    assert target.claims.features == ("merge",)


def test_module_and_function_by_name() -> None:
    assert load("mha_spec.reference:attention").functions.keys() == load("mha_spec.reference").functions.keys()
    assert load("mha_spec.reference").claims.registered
    assert load("shutil:copyfileobj").functions.keys() == {"attention"}


def test_file_does_not_hide_the_module_of_its_name(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "graphlib", raising=False)
    path = write("from graphlib import TopologicalSorter\ndef attention(query, key, value): ...", "graphlib.py")
    assert load(path).functions.keys() == {"attention"}


def test_file_finds_its_neighbours(write: Callable[..., str]) -> None:
    write("def attention(query, key, value, softcap=None): ...", "kernel_of_mine.py")
    assert load(write("from kernel_of_mine import attention")).claims.features == ("softcap",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import missing_module",
            r"does not import: ModuleNotFoundError: No module named 'missing_module' \(.*target.py:1\)",
        ),
        ("x = 1\nraise SystemExit(3)", r"does not import: SystemExit: 3 \(.*target.py:2\)"),
        ("def attention(:", "does not import: SyntaxError"),
        ("x = 1", "nothing to judge: there is no function called attention; it defines no function"),
        ("def sdpa(q, k, v): ...", "nothing to judge.*it defines sdpa: choose a function as TARGET:sdpa"),
        (
            "arrays = 'cupy'\ndef attention(q, k, v): ...",
            "`arrays` must be one of numpy, torch, jax, tensorflow, received 'cupy'",
        ),
        ("dtypes = ('float8',)\ndef attention(q, k, v): ...", "`dtypes` must be one of float64, .*received 'float8'"),
        ("dtypes = 'float32'\ndef attention(q, k, v): ...", "`dtypes` must be a tuple"),
        ("device = 3\ndef attention(q, k, v): ...", "`device` must be a string"),
        (
            "profile = 'lax'\ndef attention(q, k, v): ...",
            "`profile` must be one of standard, strict, fused, received 'lax'",
        ),
        ("features = ('masks',)\ndef attention(q, k, v): ...", "`features` must be one of .*received 'masks'"),
        ("conventions = {'mask': 'x'}\ndef attention(q, k, v): ...", "'mask' is not a convention"),
        ("conventions = {'lse_base': '10'}\ndef attention(q, k, v): ...", "lse_base must be e or 2, received '10'"),
    ],
)
def test_invalid_target_is_described_in_one_line(write: Callable[..., str], text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        load(write(text))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothere", "'nothere' is not a backend .*, a file or a module"),
        ("folder/none.py", "there is no file folder/none.py"),
        ("json:none", "json has no function 'none'; it defines"),
        ("json.none", "does not import: ModuleNotFoundError"),
    ],
)
def test_missing_target_is_named(name: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load(name)
