"""docs/frameworks.md: both sides of a row are run, and are equal, or different if the row says so."""

from __future__ import annotations

import importlib.util
import re
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from support.pages_of_docs import DOCS

import mha_spec
from mha_spec_conformance.testing import assert_attention

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, HEADS, Q_LEN, KV_LEN, SIZE = 2, 3, 5, 7, 11
ROW = re.compile(r"^\| `(?P<there>[^`]+)` \| `(?P<here>[^`]+)` \| (?P<remark>.*) ?\|$", re.MULTILINE)


def arrays() -> dict[str, Any]:
    """Return the arrays that the rows name, in NumPy; every row of the mask and of the lengths has a visible key."""
    draw = numpy.random.default_rng(11)

    def normal(*shape: int) -> numpy.ndarray:
        return draw.standard_normal(shape).astype("float32")

    mask = draw.random((BATCH, 1, Q_LEN, KV_LEN)) < 0.6
    mask[..., 1] = True
    return {
        "query": normal(BATCH, HEADS, Q_LEN, SIZE),
        "key": normal(BATCH, HEADS, KV_LEN, SIZE),
        "value": normal(BATCH, HEADS, KV_LEN, SIZE),
        "grouped_query": normal(BATCH, 2 * HEADS, Q_LEN, SIZE),
        "mask": mask,
        "bias": normal(1, HEADS, Q_LEN, KV_LEN),
        "lengths": numpy.array([5, 7]),
        "q_ids": numpy.array([0, 0, 1, 1, 1]),
        "kv_ids": numpy.array([0, 0, 0, 1, 1, 2, 2]),
        "inf": numpy.inf,
    }


def bshd(x: Any) -> Any:
    return x.swapaxes(1, 2)


def sdpa(there: str) -> numpy.ndarray:
    import torch
    from torch.nn.attention import bias
    from torch.nn.functional import scaled_dot_product_attention

    names = in_torch()
    names |= {name: getattr(bias, name) for name in ("causal_lower_right", "causal_upper_left")}
    names["keys_before"] = lambda lengths: (torch.arange(KV_LEN) < lengths[:, None])[:, None, None]
    return called(scaled_dot_product_attention, there, names)


def in_torch() -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(x) if isinstance(x, numpy.ndarray) else x for name, x in arrays().items()}


def called(function: Callable[..., Any], there: str, names: dict[str, Any]) -> numpy.ndarray:
    """Call an attention with query, key and value, unless the row passes others."""
    passed = eval(f"dict({there})", names)
    return numpy.asarray(function(**{name: names[name] for name in ("query", "key", "value")} | passed))


def flex(there: str) -> numpy.ndarray:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    names = in_torch()
    names["blocks"] = lambda function: create_block_mask(function, None, None, Q_LEN, KV_LEN, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex_attention warns that it is slow without torch.compile
        return called(flex_attention, there, names)


def in_jax() -> dict[str, Any]:
    import jax.numpy

    names = {name: jax.numpy.asarray(x) if isinstance(x, numpy.ndarray) else x for name, x in arrays().items()}
    names["lengths"] = names["lengths"].astype("int32")  # jax.nn takes no other type of integers
    return names | {name: bshd(names[name]) for name in ("query", "key", "value")} | {"bshd": bshd}


def jax_nn(there: str) -> numpy.ndarray:
    import jax

    return bshd(called(jax.nn.dot_product_attention, there, in_jax()))


def flax_nnx(there: str) -> numpy.ndarray:
    import jax.numpy
    from flax import nnx

    names = in_jax() | {"make_causal": lambda q, kv: jax.numpy.arange(q)[:, None] >= jax.numpy.arange(kv)}
    return bshd(called(nnx.dot_product_attention, there, names))


def keras_ops(there: str) -> numpy.ndarray:
    import keras

    names = arrays()
    names |= {name: bshd(names[name]) for name in ("query", "key", "value")}

    def attention(**options: Any) -> Any:
        return keras.ops.convert_to_numpy(keras.ops.dot_product_attention(**options))

    return bshd(called(attention, there, names))


@cache
def onnx_target() -> Any:
    path = Path(__file__).parents[1] / "conformance" / "targets" / "onnxruntime_attention.py"
    specification = importlib.util.spec_from_file_location("_target_of_onnx", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def onnx(there: str) -> numpy.ndarray:
    names = arrays()
    passed = eval(f"dict({there})", names)
    feed = {"Q": names["query"], "K": names["key"], "V": names["value"]}
    feed |= {name: x for name, x in passed.items() if isinstance(x, numpy.ndarray)}
    signature = tuple((name, x.dtype.name) for name, x in feed.items())
    attributes = tuple((name, x) for name, x in passed.items() if name not in feed)
    return onnx_target().session(signature, ("Y",), attributes).run(None, feed)[0]


SECTIONS: dict[str, Callable[[str], numpy.ndarray]] = {
    "torch.nn.functional.scaled_dot_product_attention": sdpa,
    "torch.nn.attention.flex_attention.flex_attention": flex,
    "jax.nn.dot_product_attention": jax_nn,
    "flax.nnx.dot_product_attention": flax_nnx,
    "keras.ops.dot_product_attention": keras_ops,
    "ONNX Attention, as ONNX Runtime runs it on the CPU": onnx,
}


def rows() -> list[Any]:
    """Return each row of the tables that are run: the section, both sides and the remark."""
    _, *parts = re.split(r"^## (.*)$", (DOCS / "frameworks.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    parameters: list[Any] = []
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        for line in re.findall(r"^\| `.*", text, flags=re.MULTILINE) if title in SECTIONS else ():
            match = ROW.match(line)
            assert match is not None, f"{title} has a row of another form: {line}"
            parameters.append(pytest.param(title, *match.groups(), id=f"{SECTIONS[title].__name__}-{match['there']}"))
    return parameters


def test_every_section_is_in_the_page() -> None:
    assert {row.values[0] for row in rows()} == SECTIONS.keys()


@pytest.mark.parametrize(("title", "there", "here", "remark"), rows())
def test_both_sides_are_equal(title: str, there: str, here: str, remark: str) -> None:
    names = arrays() | {"each": lambda ids: numpy.broadcast_to(ids, (BATCH, len(ids)))}
    options = {name: names[name] for name in ("query", "key", "value")} | eval(f"dict({here})", names)
    received = numpy.asarray(SECTIONS[title](there.replace("\\|", "|")))
    if remark.startswith("differs"):
        with pytest.raises(AssertionError, match="is wrong in"):
            assert_attention(received, **options)
        return
    assert_attention(received, **options)
    assert_attention(mha_spec.attention(**options), **options)
    plain = {name: names[name] for name in ("query", "key", "value")}
    with pytest.raises((AssertionError, mha_spec.MhaSpecError)):
        assert_attention(received, **plain)  # the arguments matter
