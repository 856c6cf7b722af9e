"""Calls over eight devices, which a process must ask for before it imports JAX: test_jax_ring runs this file.

It prints a JSON object with a list of faults, or a number, for each name.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

RANKS = 8
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", RANKS)
jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from support.comparisons import differences  # noqa: E402
from support.goldens import cases, failures, names  # noqa: E402
from support.numbers import numbers  # noqa: E402

import mha_spec_jax  # noqa: E402
from mha_spec import reference  # noqa: E402
from mha_spec.sharding import Piece, shard_order  # noqa: E402
from mha_spec_conformance.targets.claims import Shards  # noqa: E402
from mha_spec_jax import plan, ring, shards  # noqa: E402

MESH = jax.make_mesh((RANKS,), ("ranks",), axis_types=(jax.sharding.AxisType.Auto,))
TOKENS = P(None, None, "ranks")
BATCH, HEADS, KV_HEADS, SIZE, V_SIZE = 2, 16, 8, 5, 3


def tensors(q_len: int, kv_len: int) -> list[Any]:
    shapes = (BATCH, HEADS, q_len, SIZE), (BATCH, KV_HEADS, kv_len, SIZE), (BATCH, KV_HEADS, kv_len, V_SIZE), (HEADS,)
    return [jnp.asarray(numbers(*shape, seed=seed)) for seed, shape in enumerate(shapes)]


def ids(length: int) -> Any:
    return jnp.asarray(numpy.sort(numpy.arange(BATCH * length).reshape(BATCH, length) * 7 % 5, 1))


def spread(form: str, layout: str, arrays: dict[str, Any], rest: dict[str, Any], order: str | None = None) -> Any:
    """Make a function of whole query, key, value and sinks that deals them out and returns whole results."""
    function = getattr(mha_spec_jax, f"{form}_attention")

    def call(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        whole, kv_order = form == "sharded_kv", shard_order(order or layout, RANKS, key.shape[2])
        q_order = numpy.arange(query.shape[2]) if whole else shard_order(order or layout, RANKS, query.shape[2])
        sides = {"q_segment_ids": q_order, "kv_segment_ids": kv_order}
        dealt = {name: x[:, sides[name]] if name in sides else x for name, x in arrays.items()}

        def of_rank(query: Any, key: Any, value: Any, sinks: Any, options: Any) -> Any:
            options = options | rest | {"layout": layout, "axis_name": "ranks"}
            return function(query, key, value, sinks=sinks, return_lse=True, **options)

        specs = {name: P(None, "ranks") if name in sides else P() for name in dealt}
        of_queries = P() if whole else TOKENS
        output, lse = jax.shard_map(
            of_rank, mesh=MESH, in_specs=(of_queries, TOKENS, TOKENS, P(), specs), out_specs=(of_queries, of_queries)
        )(query[:, :, q_order], key[:, :, kv_order], value[:, :, kv_order], sinks, dealt)
        places = numpy.argsort(q_order)
        return output[:, :, places], lse[:, :, places]

    return call


def results(call: Any, operands: list[Any], *, gradients: bool = True) -> list[Any]:
    """Return output and lse, and the gradients for cotangents of which every element differs."""

    def run(*operands: Any) -> Any:
        outputs, pull = jax.vjp(call, *operands)
        cotangents = tuple(jnp.asarray(numbers(*x.shape, seed=9)) for x in outputs)
        return (outputs, pull(cotangents))

    return jax.tree.leaves(jax.jit(run if gradients else call)(*operands))


def expected_of(operands: list[Any], options: dict[str, Any]) -> list[numpy.ndarray]:
    """Return the results of the reference, and its gradients for the same cotangents."""
    query, key, value, sinks = map(numpy.asarray, operands)
    options = {name: numpy.asarray(x) if isinstance(x, jax.Array) else x for name, x in options.items()}
    outputs = reference.attention(query, key, value, sinks=sinks, return_lse=True, **options)
    grad_output, grad_lse = (numbers(*x.shape, seed=9) for x in outputs)
    gradients = reference.attention_vjp(grad_output, query, key, value, grad_lse=grad_lse, sinks=sinks, **options)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def faults(form: str, layout: str, lengths: tuple[int, int], options: dict[str, Any], **settings: Any) -> list[str]:
    """Compare a call over the devices with the reference on one device."""
    operands = tensors(*lengths)
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    rest = {name: x for name, x in options.items() if name not in arrays}
    gradients = settings.pop("gradients", True)

    names = ("output", "lse", *(("query", "key", "value", "sinks") if gradients else ()))
    call = spread(form, layout, arrays, rest, **settings)
    got = map(numpy.asarray, results(call, operands, gradients=gradients))
    return differences(names, got, expected_of(operands, options)[: len(names)])


def meanings() -> dict[str, Any]:
    """Ask every form and layout, forward and backward, with options that hide by different means."""
    lengths = {"kv_lengths": jnp.asarray([41, 17]), "q_lengths": [31, 5], "q_offset": jnp.asarray([3, 17])}
    segments = {"q_segment_ids": ids(48), "kv_segment_ids": ids(48)}
    return {
        "ring zigzag": faults("ring", "zigzag", (48, 48), {"causal": True, "softcap": 2.0}),
        "ring striped": faults("ring", "striped", (32, 48), {"window": (11, 2), "q_offset": "lower_right"}),
        "ring contiguous": faults("ring", "contiguous", (32, 48), {"causal": True, "window": (13, None)} | lengths),
        "ring segments": faults("ring", "striped", (48, 48), {"causal": True} | segments),
        "ring chunk": faults("ring", "zigzag", (48, 48), {"causal": True, "chunk": 7, "kv_starts": [3, 11]}),
        "all to all": faults("all_to_all", "zigzag", (48, 48), {"causal": True} | segments),
        "decoding": faults(
            "sharded_kv", "striped", (3, 48), {"causal": True, "q_offset": [38, 7], "kv_lengths": [41, 10]}
        ),
    }


def rounding() -> dict[str, Any]:
    """Compare the gradient of a query in bfloat16 with that of the same numbers in float32, rounded once."""
    *operands, _ = (x.astype(jnp.bfloat16) for x in tensors(3, 48))

    def of_query(*operands: Any) -> Any:
        def call(query: Any, key: Any, value: Any) -> Any:
            return mha_spec_jax.sharded_kv_attention(query, key, value, axis_name="ranks", return_lse=True)[1]

        specs = P(), TOKENS, TOKENS
        lse, pull = jax.vjp(jax.shard_map(call, mesh=MESH, in_specs=specs, out_specs=P()), *operands)
        return pull(jnp.asarray(numbers(*lse.shape, seed=9), lse.dtype))[0]

    narrow, wide = (jax.jit(of_query)(*(x.astype(dtype) for x in operands)) for dtype in (jnp.bfloat16, jnp.float32))
    narrow, wide = (numpy.asarray(x.astype(jnp.bfloat16)).astype("float64") for x in (narrow, wide))
    return {"rounding": differences(("query",), [narrow], [wide])}


def goldens() -> dict[str, Any]:
    """Ask goldens of the target of conformance, within their allowances."""
    path = Path(__file__).parents[1] / "conformance" / "targets" / "devices" / "jax_ring.py"
    spec = spec_from_file_location("target_of_ring", path)
    assert spec is not None
    target = module_from_spec(spec)
    spec.loader.exec_module(target)

    def ask(query: Any, key: Any, value: Any, **options: Any) -> dict[str, Any]:
        options.pop("return_lse", None)
        output, lse = target.attention(query, key, value, return_lse=True, **options)
        return {"output": output, "lse": lse}

    def ask_vjp(grad_output: Any, query: Any, key: Any, value: Any, **options: Any) -> dict[str, Any]:
        gradients = target.attention_vjp(grad_output, query, key, value, **options)
        named = zip(("query", "key", "value", "bias", "sinks"), gradients, strict=True)
        return {f"grad_{name}": x for name, x in named if x is not None}

    refused = {"mask", "bias", "dropout_rate", "dropout_mask", "dropout_key"}
    some = {
        function: [case for case in cases(function) if not names(case) & refused]
        for function in ("attention", "attention_vjp")
    }
    of_target = partial(failures, "jax", shards=Shards(RANKS, target.LAYOUT))
    faults_of: dict[str, Any] = {}
    case = next(case for case in some["attention"] if "sinks" in names(case) and "float32" in case.dtypes)
    faults_of["golden sinks"] = of_target([case], ask, "float32")
    poisoned = next(case for case in some["attention"] if "poison" in case.features and "float32" in case.dtypes)
    faults_of["golden poison"] = of_target([poisoned], ask, "float32")
    case = next(case for case in some["attention_vjp"] if "causal" in names(case) and "bfloat16" in case.dtypes)
    faults_of["golden gradients"] = of_target([case], ask_vjp, "bfloat16")
    return faults_of


def mistakes() -> dict[str, Any]:
    """Plant mistakes: each must be seen, in the forward pass where it has one."""
    ask = partial(faults, "ring", "striped", (32, 32), {"causal": True})
    planted: dict[str, Any] = {"mistake layout": ask(order="zigzag", gradients=False)}
    true_pieces, true_call, true_rotate, true_merge = shards.pieces, shards.Pair.call, ring.rotate, ring.merge

    def unshifted(layout: str, rank: Any, ranks: int, length: int) -> tuple[Piece, ...]:
        return tuple(piece._replace(first=0 * piece.first) for piece in true_pieces(layout, rank, ranks, length))

    def with_sinks(pair: Any, span: Any) -> Any:
        call = true_call(pair, span)
        return call._replace(x=call.x._replace(sinks=jnp.ones(HEADS)))

    def mean(halves: Any) -> Any:
        _, lse = true_merge(halves)
        return (halves.output_a + halves.output_b) / 2, lse

    def only_keys(form: Any, tree: Any) -> Any:
        return true_rotate(form, tree) if tree and isinstance(tree[0], shards.Keys) else tree

    for name, module, attribute, wrong, gradients in (
        ("offset", shards, "pieces", unshifted, False),
        ("sinks", shards.Pair, "call", with_sinks, False),
        ("merge", ring, "merge", mean, False),
        ("rank of keys", ring, "rotate", only_keys, True),
    ):
        right = getattr(module, attribute)
        setattr(module, attribute, wrong)
        jax.clear_caches()
        planted[f"mistake {name}"] = ask(gradients=gradients)
        setattr(module, attribute, right)
    return planted


def memory() -> dict[str, Any]:
    """Compile a training step of 65,536 tokens for one device and for eight, and count the bytes of a device.

    A zigzag shard is cut into its chunks, which must not be kept beside it.
    """
    query = jax.ShapeDtypeStruct((1, 8, 65536, 128), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 2, 65536, 128), jnp.float32)

    def ours(query: Any, key: Any, value: Any) -> Any:
        call = partial(mha_spec_jax.ring_attention, axis_name="ranks", layout="zigzag", causal=True)
        return jax.shard_map(call, mesh=MESH, in_specs=TOKENS, out_specs=TOKENS)(query, key, value)

    def step(call: Any, query: Any, key: Any, value: Any) -> Any:
        output, pull = jax.vjp(call, query, key, value)
        return pull(output)

    def bytes_of(call: Any, **shardings: Any) -> int:
        program = jax.jit(partial(step, call), **shardings).lower(query, key, key).compile()
        usage = program.memory_analysis()
        return usage.argument_size_in_bytes + usage.output_size_in_bytes + usage.temp_size_in_bytes

    over = NamedSharding(MESH, TOKENS)
    whole = bytes_of(partial(mha_spec_jax.attention, causal=True))
    return {"memory": [bytes_of(ours, in_shardings=over, out_shardings=over), whole]}


def programs() -> dict[str, Any]:
    """Name the collectives that a call or a layer with sharded batch and heads holds after compilation."""
    kinds_of: dict[str, Any] = {}
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    heads, entries, everywhere = P("batch", "heads"), P("batch"), P()

    def collectives(call: Any, arguments: Any, specs: Any) -> list[str]:
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
        text = jax.jit(call, in_shardings=shardings).lower(*arguments).compile().as_text()
        kinds = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
        return [kind for kind in kinds if f" {kind}(" in text or f" {kind}-start(" in text]

    x, k = jnp.zeros((4, 8, 12, 5)), jnp.zeros((4, 4, 12, 5))
    arrays = {
        "mask": jnp.ones((4, 8, 12, 12), bool),
        "bias": jnp.zeros((4, 8, 12, 12)),
        "sinks": jnp.zeros(8),
        "kv_lengths": jnp.full(4, 12),
        **dict.fromkeys(("q_segment_ids", "kv_segment_ids"), jnp.zeros((4, 12), int)),
    }
    sharded = {"mask": heads, "bias": heads, "sinks": P("heads")}
    sharded |= dict.fromkeys(("kv_lengths", "q_segment_ids", "kv_segment_ids"), entries)

    def gradients(query: Any, key: Any, arrays: Any) -> Any:
        return mha_spec_jax.attention_vjp(query, query, key, key, **arrays)

    calls: dict[str, Any] = {
        "": lambda query, key, arrays: mha_spec_jax.attention(query, key, key, causal=True, q_offset=0, **arrays),
        " of weights": lambda query, key, arrays: mha_spec_jax.attention_weights(query, key, softcap=2.0, **arrays),
        " of gradients": lambda query, key, arrays: gradients(query, key, arrays)[:4],
        " of sinks": lambda query, key, arrays: gradients(query, key, arrays)[4],
    }
    for name, call in calls.items():
        for place, specs in (("replicated", dict.fromkeys(arrays, everywhere)), ("sharded", sharded)):
            kinds_of[f"program {place}{name}"] = collectives(call, (x, k, arrays), (heads, heads, specs))
    shapes = {"w_q": (7, 8, 5), "w_k": (7, 4, 5), "w_v": (7, 4, 5), "w_o": (8, 5, 7)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    split = {name: P("heads") if name == "w_o" else P(None, "heads") for name in shapes}

    def layer(tokens: Any, params: Any, lengths: Any) -> Any:
        options: dict[str, Any] = {"causal": True, "kv_lengths": lengths, "q_offset": 0, "rotary": {"rotary_dim": 4}}
        return mha_spec_jax.multi_head_attention(tokens, tokens, tokens, params, **options)

    kinds_of["program layer"] = collectives(
        layer, (jnp.zeros((4, 12, 7)), params, jnp.full(4, 12)), (entries, split, entries)
    )
    return kinds_of


def own_queries() -> dict[str, Any]:
    """Call functions on two ranks, each of which has its own queries and the keys of both, as in data parallelism."""
    mesh = jax.make_mesh((2,), ("ranks",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    plan.SCORES = 2**10
    bounds, table = jnp.asarray([0, 2, 5, 0, 5, 5]), jnp.asarray([[2, 0], [1, 0], [0, 2], [3, 3]])
    tokens, dense = [jnp.asarray(numbers(size, 4, SIZE)) for size in (10, 7)], tensors(200, 200)[:2]

    def packed(query: Any, key: Any, bounds: Any) -> Any:
        return mha_spec_jax.varlen_attention(query, key, key, bounds, [0, 4, 7], causal=True, q_offset="lower_right")

    def paged(query: Any, key: Any, bounds: Any, table: Any) -> Any:
        used = {"block_table": table, "seqused_kv": jnp.asarray([5, 3])}
        return mha_spec_jax.varlen_attention(query, key, key, bounds, None, **used)

    calls: dict[str, Any] = {
        "own queries, packed": (packed, (*tokens, bounds)),
        "own queries, paged": (paged, (tokens[0], jnp.asarray(numbers(4, 3, 2, SIZE)), bounds, table)),
        "own queries, blocks": (lambda query, key: mha_spec_jax.attention(query, key[:1], key[:1], causal=True), dense),
    }
    of_calls: dict[str, Any] = {}
    for name, (call, arrays) in calls.items():
        specs = tuple(P() if index == 1 else P("ranks") for index in range(len(arrays)))
        ranks = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P("ranks"))
        of_calls[name] = differences(
            ("output", "query", "key"), *(_with_gradients(x, arrays) for x in (ranks, partial(_in_turn, call)))
        )
    return of_calls


def _in_turn(call: Any, *arrays: Any) -> Any:
    """Compute the outputs of two ranks, which share the second array."""
    parts = [x if index == 1 else jnp.split(x, 2) for index, x in enumerate(arrays)]
    return jnp.concatenate([call(*(x[rank] if index != 1 else x for index, x in enumerate(parts))) for rank in (0, 1)])


def _with_gradients(call: Any, arrays: Any) -> tuple[Any, ...]:
    @jax.jit
    def results(query: Any, key: Any) -> Any:
        output, pull = jax.vjp(lambda query, key: call(query, key, *arrays[2:]), query, key)
        return output, *pull(jnp.cos(output))

    return tuple(map(numpy.asarray, results(*arrays[:2])))


def explicit_axes() -> dict[str, Any]:
    """Call functions on arrays whose sharding is a part of their type, the default of jax.make_mesh."""
    mesh = jax.make_mesh((2,), ("ranks",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    dense, tokens = tensors(8, 8)[:3], [jnp.asarray(numbers(10, heads, SIZE)) for heads in (4, 2)]
    bounds = [0, 4, 7]
    calls: dict[str, Any] = {
        "explicit axes": (mha_spec_jax.attention, mha_spec_jax.attention_vjp, dense, {"causal": True}, TOKENS),
        "explicit axes, packed": (
            mha_spec_jax.varlen_attention,
            mha_spec_jax.varlen_attention_vjp,
            (*tokens, tokens[1]),
            {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "causal": True},
            P("ranks"),
        ),
    }
    of_calls: dict[str, Any] = {}
    for name, (attend, vjp, arrays, options, spec) in calls.items():
        results = []
        for over in (P(), spec):
            query, key, value = (jax.device_put(x, NamedSharding(mesh, over)) for x in arrays)
            output = attend(query, key, value, **options)
            assert output.sharding.is_equivalent_to(NamedSharding(mesh, over), output.ndim)
            cotangent = jax.device_put(jnp.cos(output), NamedSharding(mesh, P()))
            gradients = vjp(cotangent, query, key, value, **options)[:3]
            results.append([numpy.asarray(x) for x in (output, *gradients)])
        alone = numpy.asarray(attend(*arrays, **options))
        of_calls[name] = differences(("output", "query", "key", "value"), *results)
        of_calls[name] += differences(("output alone",), results[1][:1], (alone,))
    return of_calls


def explicit_caches() -> dict[str, Any]:
    """Decode tokens that are sharded over the batch, on a mesh with explicit axes.

    The buffers of the caches are on all devices, with lengths on the host, or everything is sharded over its first
    axis, also the parameters of the layer, but for a weight that is sharded over its last axis.
    """
    mesh = jax.make_mesh((2,), ("ranks",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    options: Any = {"kv_heads": 2, "bias": True, "qk_norm": True, "rotary": {}, "dtype": "float64"}
    layer = mha_spec_jax.MultiHeadAttention(16, 4, key=jax.random.key(0), **options)
    layer = jax.tree.map(lambda array: array + jnp.asarray(numbers(*array.shape)) / 9, layer)
    x = jnp.asarray(numbers(2, 5, 16))
    caches = {
        "cache": mha_spec_jax.KVCache.empty(2, 2, 8, 4, like=x),
        "window": mha_spec_jax.WindowKVCache.empty(2, 2, 3, 4, like=x),
        "pages": mha_spec_jax.PagedKVCache.empty(numpy.arange(4).reshape(2, 2), 4, 4, 2, 4, like=x),
    }

    def decoded(layer: Any, x: Any, cache: Any) -> Any:
        outputs = []
        for part in (x[:, :3], x[:, 3:4], x[:, 4:]):
            output, cache = layer(part, causal=True, window=(2, None), cache=cache)
            outputs.append(numpy.asarray(output))
        return numpy.concatenate(outputs, 1), numpy.asarray(cache.key), numpy.asarray(cache.value)

    over_first, everywhere = NamedSharding(mesh, P("ranks")), NamedSharding(mesh, P())
    differing = {}
    for name, cache in caches.items():
        replicated = cache._replace(
            key=jax.device_put(cache.key, everywhere), value=jax.device_put(cache.value, everywhere)
        )
        sharded = jax.tree.map(lambda array: jax.device_put(array, over_first), (layer, cache))
        weight = jax.device_put(layer.params["w_v"], NamedSharding(mesh, P(None, None, "ranks")))
        sharded = sharded[0].replace(w_v=weight), sharded[1]
        alone, tokens = decoded(layer, x, cache), jax.device_put(x, over_first)
        differing[f"explicit axes, {name}"] = [
            different
            for model, other in ((layer, replicated), sharded)
            for different in differences(("output", "key", "value"), decoded(model, tokens, other), alone)
        ]
    return differing


def example() -> dict[str, Any]:
    """Run the examples of JAX in docs/scaling.md, and compare their outputs with those of one device."""
    page = Path(__file__).parents[1].joinpath("docs", "scaling.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    of_decoding: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    exec(page.partition("## Decoding")[2].split("```python\n")[1].split("```")[0], of_decoding)
    x = jnp.asarray(numpy.asarray(scope["x"]))[:, :, numpy.argsort(scope["order"])]
    expected = mha_spec_jax.attention(x, x, x, causal=True)
    decoded = mha_spec_jax.attention(of_decoding["queries"], *of_decoding["tokens"], causal=True)
    of_steps = numpy.concatenate(of_decoding["outputs"], 2)
    return {
        "example": differences(("output",), (scope["output"],), (numpy.asarray(expected),)),
        "example of decoding": differences(("output",), (of_steps,), (numpy.asarray(decoded),)),
    }


if __name__ == "__main__":
    answers: dict[str, Any] = {}
    for part in sys.argv[1:]:
        answers |= globals()[part]()
    sys.stdout.write(json.dumps(answers))
