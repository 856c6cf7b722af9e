"""Mistakes of the cache: tokens stored, counted or seen wrongly; and layer calls that must raise an error."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import layer_checks, layer_steps
from mha_spec.offsets import named_offset
from mha_spec.reference import attention, attention_weights
from mha_spec.rotary_checks import Rotary

from .layer import layered
from .mistake import ALIBI, LAYER, MULTI_HEAD, ROTARY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mha_spec.layer_checks import LayerArguments

    from .layer import Within
    from .mistake import Mistake

__all__ = ["CACHING", "padding_counted", "stored_at", "stored_at_the_end"]


def stored_at(
    change: Callable[..., tuple[Any, Any]], right: Callable[..., numpy.ndarray] = layer_steps.store
) -> Callable[..., numpy.ndarray]:
    """Store in other slots: `change` computes (start, stop) from the right slots and the buffer."""

    def store(buffer: numpy.ndarray, new: numpy.ndarray, start: Any, stop: Any) -> numpy.ndarray:
        places = change(numpy.asarray(start), numpy.asarray(stop), buffer)
        return right(buffer, new, *places)

    return store


def stored_at_the_end(buffer: numpy.ndarray, new: numpy.ndarray, start: Any, stop: Any) -> numpy.ndarray:
    """Shift the buffer and store the new tokens in the last slots."""
    return numpy.concatenate([buffer, new], axis=2)[:, :, new.shape[2] :]


def padding_counted(lengths: Any, _: Any, length: Any, like: Any) -> Any:
    """Count all new tokens, those of padding included."""
    return layer_steps.new_lengths(lengths, None, length, like)


def stored_in_place(buffer: numpy.ndarray, new: numpy.ndarray, start: Any, stop: Any) -> numpy.ndarray:
    """Write into the buffer of the old cache."""
    buffer[...] = layer_steps.store(buffer, new, start, stop)
    return buffer


def seeing(**other: Any) -> Within:
    """Call attention with other options; a callable computes its option from query, key and options."""

    def change(options: dict[str, Any], query: numpy.ndarray, key: numpy.ndarray) -> dict[str, Any]:
        changed = {name: value(query, key, options) if callable(value) else value for name, value in other.items()}
        return {**options, **changed}

    def attend(query: numpy.ndarray, key: numpy.ndarray, value: numpy.ndarray, **options: Any) -> Any:
        return attention(query, key, value, **change(options, query, key))

    def weigh(query: numpy.ndarray, key: numpy.ndarray, **options: Any) -> Any:
        return attention_weights(query, key, **change(options, query, key))

    return attend, weigh


def dropping(option: str, clause: str, *bugs: str) -> Mistake:
    """Return the mistake of a layer that does not use an option with a cache."""
    return layered(
        f"{option}-dropped-with-a-cache",
        f"does not use {option} with a cache",
        clause,
        within=seeing(**{option: None}),
        needs=("cache_lengths", option),
        bugs=bugs,
    )


def lengths_of(query: numpy.ndarray, key: numpy.ndarray, options: Mapping[str, Any]) -> numpy.ndarray:
    """Return the number of keys of each batch entry; a window cache that is full passes no lengths."""
    return numpy.broadcast_to(options.get("kv_lengths", key.shape[2]), query.shape[:1])


def prefix_hidden(query: numpy.ndarray, key: numpy.ndarray, options: dict[str, Any]) -> Any:
    """Hide the keys before the new tokens, if there are several."""
    start = lengths_of(query, key, options) - query.shape[2]
    return options.get("mask") if query.shape[2] == 1 else _masked(options, key, lambda slots: slots >= start[:, None])


def of_new_tokens(query: numpy.ndarray, options: Mapping[str, Any]) -> bool:
    """Tell whether several queries come without an array for pairs of queries and keys."""
    for_pairs = ("mask", "bias", "q_segment_ids", "kv_segment_ids", "dropout_mask")
    return query.shape[-2] > 1 and all(options.get(name) is None for name in for_pairs)


def prefix_hidden_alone(query: numpy.ndarray, key: numpy.ndarray, options: dict[str, Any]) -> Any:
    """Hide the keys before several new tokens, which `at_new_tokens` puts at their slots."""
    start = numpy.reshape(options.get("q_offset", lengths_of(query, key, options) - query.shape[2]), (-1, 1))
    return _masked(options, key, lambda slots: slots >= start) if of_new_tokens(query, options) else options.get("mask")


def at_new_tokens(a: LayerArguments) -> LayerArguments:
    """Do not use the offset of several new tokens."""
    checked = layer_checks.check(a)
    if checked.cache is None or not of_new_tokens(checked.query, checked.options):
        return checked
    return replace(checked, options={**checked.options, "q_offset": None})


def cut_at_the_front(query: numpy.ndarray, key: numpy.ndarray, options: dict[str, Any]) -> Any:
    """Hide as many keys at the front of the buffer as there are new tokens."""
    return _masked(options, key, lambda slots: (slots >= query.shape[2])[None])


def blind_from(slot: int) -> Callable[..., Any]:
    """Hide the keys from this slot on."""
    return lambda query, key, options: _masked(options, key, lambda slots: (slots < slot)[None])


def _masked(options: dict[str, Any], key: numpy.ndarray, seen: Callable[[numpy.ndarray], numpy.ndarray]) -> Any:
    """Return the mask of a call, that also hides the slots that `seen`, (batch or 1, kv_len), does not choose."""
    further = seen(numpy.arange(key.shape[2]))[:, None, None]
    mask = options.get("mask")
    return further if mask is None else further & mask


def key_stored_as_value(cache: Any, key: Any, value: Any, counts: Any, steps: Any) -> Any:
    """Store the key as the value too, if their shapes are equal."""
    alike = value is not None and key.shape == value.shape
    return layer_steps.append(cache, key, key if alike else value, counts, steps)


def window_of_many(query: numpy.ndarray, key: numpy.ndarray, options: dict[str, Any]) -> Any:
    """Return no window for a single query."""
    return None if query.shape[2] == 1 else options.get("window")


CACHING = (
    layered(
        "cache-overwritten",
        "stores new tokens at slot 0",
        "MHA-CACHE-1",
        "MHA-CACHE-2",
        store=stored_at(lambda start, stop, buffer: (0 * start, stop - start)),
        needs=("cache_lengths", "key"),
    ),
    layered(
        "cache-one-slot-late",
        "leaves an empty slot before the new tokens",
        "MHA-CACHE-1",
        store=stored_at(lambda start, stop, buffer: (start + 1, stop + 1)),
        needs=("cache_lengths", "key"),
    ),
    layered(
        "cache-of-the-first-entry",
        "stores the tokens of every batch entry in the slots of the first",
        "MHA-CACHE-1",
        store=stored_at(lambda start, stop, buffer: (start[:1] + 0 * start, start[:1] + stop - start)),
        needs=("cache_lengths", "key"),
        bugs=("tenstorrent/tt-metal#41215",),
    ),
    layered(
        "cache-rolled",
        "shifts the buffer for new tokens even if it is not full",
        "MHA-CACHE-1",
        store=stored_at_the_end,
        needs=("cache_lengths", "key"),
        bugs=("huggingface/transformers#37574", "Lightning-AI/litgpt#2182"),
    ),
    layered(
        "cache-not-counted",
        "stores new tokens and does not count them",
        "MHA-CACHE-1",
        "MHA-CACHE-6",
        append=lambda cache, key, value, counts, steps: layer_steps.append(cache, key, value, counts, steps)._replace(
            lengths=cache.lengths
        ),
        needs=("cache_lengths", "key"),
    ),
    layered(
        "cache-written-in-place",
        "writes new tokens into the buffers of the old cache",
        "MHA-CACHE-3",
        store=stored_in_place,
        needs=("cache_lengths", "key"),
        bugs=("Lackel/ALFAR#3",),
    ),
    layered(
        "cache-padding-kept",
        "stores and counts padding as new tokens",
        "MHA-CACHE-5",
        new_lengths=padding_counted,
        needs=("cache_lengths", "kv_lengths"),
        bugs=("meta-pytorch/torchtune#1250",),
    ),
    layered(
        "cache-stale-entries-seen",
        "sees every slot of the buffer, whatever the lengths are",
        "MHA-CACHE-6",
        within=seeing(kv_lengths=None),
        needs=("cache_lengths",),
        bugs=("vllm-project/vllm-xpu-kernels PR#181", "tenstorrent/tt-metal#41215"),
    ),
    layered(
        "cache-causal-upper-left",
        "puts the queries at position 0, whatever number of tokens the cache holds",
        "MHA-CACHE-6",
        "MHA-CACHE-2",
        within=seeing(q_offset=0),
        needs=("cache_lengths", "causal"),
        functions=MULTI_HEAD,
        bugs=("google/flax#5591", "ooples/AiDotNet#1634"),
    ),
    layered(
        "cache-causal-from-capacity",
        "puts the queries at the end of the buffer",
        "MHA-CACHE-6",
        within=seeing(q_offset=lambda query, key, options: key.shape[2] - query.shape[2]),
        needs=("cache_lengths", "causal"),
        functions=MULTI_HEAD,
        bugs=("huggingface/transformers PR#30437",),
    ),
    layered(
        "window-lost-in-steps",
        "does not use the window of the layer for a single query",
        "MHA-CACHE-2",
        within=seeing(window=window_of_many),
        needs=("cache_lengths", "window"),
        functions=MULTI_HEAD,
        bugs=("karpathy/nanochat#452",),
    ),
    layered(
        "cache-of-encoder-cut",
        "sees at most q_len cached keys",
        "MHA-CACHE-8",
        within=seeing(
            kv_lengths=lambda query, key, options: numpy.minimum(lengths_of(query, key, options), query.shape[2])
        ),
        needs=("cache_lengths",),
    ),
    dropping("mask", "MHA-CACHE-6", "EricLBuehler/mistral.rs#2094"),
    dropping("bias", "MHA-CACHE-6", "NVIDIA/TensorRT-LLM#13870", "keras-team/keras-hub#2861"),
    dropping("window", "MHA-CACHE-2", "karpathy/nanochat#452"),
    dropping("softcap", "MHA-CACHE-2"),
    dropping("sinks", "MHA-CACHE-2"),
    layered(
        "key-stored-as-value",
        "stores the key in the value's buffer of the cache too",
        "MHA-CACHE-1",
        append=key_stored_as_value,
        needs=("cache_lengths", "key"),
        functions=MULTI_HEAD,
        bugs=("huggingface/transformers#34232",),
    ),
    layered(
        "cached-prefix-hidden",
        "does not see the cached tokens before several new tokens",
        "MHA-CACHE-2",
        within=seeing(mask=prefix_hidden),
        needs=("cache_lengths", "key"),
        bugs=("Wenyueh/MinivLLM#98", "tanishqkumar/ssd#22"),
    ),
    layered(
        "cached-prefix-hidden-without-mask",
        "does not see the cached tokens before several new tokens if there is no mask, bias, segment or dropout",
        "MHA-CACHE-2",
        within=seeing(mask=prefix_hidden_alone),
        check=at_new_tokens,
        needs=("cache_lengths", "key"),
        bugs=("Wenyueh/MinivLLM#98", "tanishqkumar/ssd#22"),
    ),
    layered(
        "cache-cut-at-the-front",
        "drops as many cached tokens at the front as there are new tokens",
        "MHA-CACHE-2",
        within=seeing(mask=cut_at_the_front),
        needs=("cache_lengths", "key"),
        bugs=("huggingface/transformers#37574",),
    ),
    *(
        layered(
            f"layer-blind-from-key-{slot}",
            f"does not see the slots of the cache from slot {slot} on",
            "MHA-CACHE-6",
            within=seeing(mask=blind_from(slot)),
            needs=("cache_lengths",),
        )
        for slot in (16, 64)
    ),
    layered(
        "rotary-lower-right-of-the-buffers",
        "rotates at the lower right of the buffers, whatever the lengths are",
        "MHA-POS-2",
        "MHA-CACHE-6",
        offset_of=lambda reading, q_lengths, kv_lengths, query, key: named_offset(reading, None, None, query, key),
        needs=("rotary", "q_offset"),
    ),
    layered(
        "layer-unchecked",
        "accepts parameters, tokens and caches that do not fit together",
        "MHA-PROJ-4",
        "MHA-NORM-1",
        "MHA-LAYER-2",
        "MHA-LAYER-3",
        "MHA-LAYER-6",
        "MHA-CACHE-4",
        "MHA-CACHE-7",
        "MHA-CACHE-8",
        "MHA-CACHE-14",
        check=lambda a: a,
        bugs=("karpathy/nanochat#627", "lightseekorg/tokenspeed#506"),
    ),
    layered(
        "rotary-unchecked",
        "accepts an odd rotary_dim and unknown options of rotary",
        "MHA-ROTARY-6",
        check_rotary=lambda rotary, size: Rotary(**rotary),
        check_positions=lambda x, positions: None,
        functions=(*LAYER, *ROTARY),
    ),
    layered(
        "alibi-unchecked",
        "accepts slopes of any shape",
        "MHA-ALIBI-3",
        check_alibi=lambda slopes, q_len, kv_len, offset: None,
        check_heads=lambda heads: None,
        functions=ALIBI,
    ),
)
