"""mha_spec as `attn_implementation` of transformers: small random models, compared with "eager".

Two float64 evaluations of a function agree far better than a float32 evaluation agrees with either. The error of our
float32 evaluation is therefore the tolerance.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
import transformers_attention
from support.comparisons import assert_equal, assert_same, largest_difference
from support.transformers_world import InFloat64, in_dtype_of, randomized
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

BATCH, LENGTH, SOURCE, SYMBOLS, MELS = 3, 13, 11, 67, 5

OURS, WRONG = "mha_spec", "mha_spec_mistaken"

SHARED: dict[str, Any] = {"vocab_size": SYMBOLS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER: dict[str, Any] = {
    **SHARED,
    "hidden_size": 42,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "max_position_embeddings": 64,
}
WHISPER: dict[str, Any] = {
    **SHARED,
    "d_model": 42,
    "num_mel_bins": MELS,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 53,
    "decoder_ffn_dim": 53,
    "max_source_positions": SOURCE,
    "max_target_positions": 64,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}
T5: dict[str, Any] = {
    **SHARED,
    "d_model": 42,
    "d_kv": 14,
    "d_ff": 53,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 7,
    "relative_attention_max_distance": 11,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 1,
}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**DECODER, sliding_window=5, attn_logit_softcapping=2.0)
    ),
    "gpt_oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**DECODER, **EXPERTS, sliding_window=5)
    ),
}
"""Encoders and decoders without and with cross attention; position bias; softcap and window; sinks and window."""


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Register mha_spec, and use a single thread, which is fastest for such small models."""
    transformers_attention.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def models(name: str) -> dict[str, Any]:
    """Make a model with weights in float64, and the same model rounded to float32."""
    torch.manual_seed(7)
    double = randomized(MODELS[name]())
    return {"float64": double, "float32": deepcopy(double).float()}


def inputs(name: str) -> dict[str, Tensor]:
    """Make a batch of sentences of different lengths; models without an encoder have the padding on the left."""
    rng = torch.Generator().manual_seed(7)
    tokens = torch.randint(3, SYMBOLS, (BATCH, LENGTH), generator=rng)
    lengths = torch.tensor([LENGTH, 9, 4])[:, None]
    left, right = (torch.arange(LENGTH) >= LENGTH - lengths).long(), (torch.arange(LENGTH) < lengths).long()
    if name == "whisper":
        sound = torch.randn(BATCH, MELS, 2 * SOURCE, generator=rng, dtype=torch.float64)
        return {"input_features": sound, "decoder_input_ids": tokens * right, "decoder_attention_mask": right}
    if name == "t5":
        return {"input_ids": tokens * right, "attention_mask": right, "decoder_input_ids": tokens.flip(1)}
    return {"input_ids": tokens * left, "attention_mask": left}


def names_of_tokens(batch: dict[str, Tensor]) -> tuple[str, str]:
    """Return the names of the decoder's tokens and of their mask."""
    prefix = "decoder_" if "decoder_input_ids" in batch else ""
    return f"{prefix}input_ids", f"{prefix}attention_mask"


def real(batch: dict[str, Tensor]) -> Tensor:
    """Return the mask of the decoder's tokens that are not padding, (batch, length)."""
    tokens, mask = names_of_tokens(batch)
    return batch[mask].bool() if mask in batch else torch.ones_like(batch[tokens], dtype=torch.bool)


def ask(model: Any, implementation: str, batch: dict[str, Tensor], **options: Any) -> Any:
    """Call a model with an implementation of attention."""
    model.set_attn_implementation(implementation)
    cast = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in batch.items()}
    with in_dtype_of(model):
        return model(**cast, **options)


def logits(model: Any, implementation: str, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return ask(model, implementation, batch).logits[real(batch)]


def in_pieces(model: Any, implementation: str, batch: dict[str, Tensor], past: Any = None) -> Tensor:
    """Compute the logits with a cache: of seven tokens, of two more, then token by token."""
    tokens, mask = names_of_tokens(batch)
    pieces: list[Tensor] = []
    for start, stop in pairwise((0, 7, 9, *range(10, LENGTH + 1))):
        piece = batch | {tokens: batch[tokens][:, start:stop]}
        if mask in batch:
            piece[mask] = batch[mask][:, :stop]
        with torch.no_grad():
            answer = ask(model, implementation, piece, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        pieces.append(answer.logits)
    return torch.cat(pieces, dim=1)[real(batch)]


def gradients(model: Any, implementation: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute the gradients of all parameters in training, by a loss that weighs every logit of a real token."""
    model = deepcopy(model).train()
    of_real = ask(model, implementation, batch).logits[real(batch)]
    weights = torch.randn(of_real.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (of_real * weights.to(of_real.dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def weights(model: Any, implementation: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of every layer of every kind of attention, (layers, tokens, heads, kv_len)."""
    with torch.no_grad():
        answer = ask(model, implementation, batch, output_attentions=True)
    kinds = {kind: torch.stack(answer[kind]).transpose(2, 3) for kind in answer if kind.endswith("attentions")}
    return {
        kind: layers.flatten(1, 2) if kind.startswith("encoder") else layers[:, real(batch)]
        for kind, layers in kinds.items()
    }


@cache
def judged_logits(name: str) -> Tensor:
    """Compute the logits of "eager"."""
    return logits(models(name)["float64"], "eager", inputs(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_eager(name: str) -> None:
    assert_same(lambda dtype: logits(models(name)[dtype], OURS, inputs(name)), judged_logits(name))


@pytest.mark.parametrize("name", ["llama", "whisper", "gemma2"])
def test_the_logits_without_padding_are_those_of_eager(name: str) -> None:
    batch = {key: x for key, x in inputs(name).items() if not key.endswith("mask")}
    judged = logits(models(name)["float64"], "eager", batch)
    assert_same(lambda dtype: logits(models(name)[dtype], OURS, batch), judged)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_gives_the_logits_of_all_at_once(name: str) -> None:
    assert_same(lambda dtype: in_pieces(models(name)[dtype], OURS, inputs(name)), judged_logits(name))


def test_a_cache_of_fixed_size_gives_the_logits_of_all_at_once() -> None:
    def ours(dtype: str) -> Tensor:
        model = models("llama")[dtype]
        past = transformers.StaticCache(model.config, max_cache_len=LENGTH + 4)
        return in_pieces(model, OURS, inputs("llama"), past)

    assert_same(ours, judged_logits("llama"))


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_it_generates_the_tokens_of_eager(name: str) -> None:
    batch, generated = inputs(name), {}
    model = models(name)["float64"]
    for implementation in ("eager", OURS):
        model.set_attn_implementation(implementation)
        with InFloat64():
            generated[implementation] = model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
    assert generated[OURS].shape[1] >= LENGTH
    assert len(generated[OURS].unique()) > LENGTH // 2
    assert_equal(generated[OURS], generated["eager"])


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_are_those_of_eager(name: str) -> None:
    judged = gradients(models(name)["float64"], "eager", inputs(name))
    assert_same(lambda dtype: gradients(models(name)[dtype], OURS, inputs(name)), judged)


@pytest.mark.parametrize("name", ["llama", "whisper", "gpt_oss"])
def test_the_weights_are_those_of_eager(name: str) -> None:
    judged = weights(models(name)["float64"], "eager", inputs(name))
    assert_same(lambda dtype: weights(models(name)[dtype], OURS, inputs(name)), judged)


def test_a_mask_of_numbers_is_a_bias() -> None:
    batch = inputs("llama")
    rng = torch.Generator().manual_seed(7)
    numbers = torch.randn(BATCH, 1, LENGTH, LENGTH, generator=rng, dtype=torch.float64)
    batch["attention_mask"] = numbers.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), float("-inf"))

    def of_all(dtype: str, implementation: str = OURS) -> Tensor:
        with torch.no_grad():
            return ask(models("llama")[dtype], implementation, batch).logits

    assert_same(of_all, of_all("float64", "eager"))


def test_dropout_is_drawn_in_training() -> None:
    model, batch = deepcopy(models("llama")["float64"]), inputs("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    plain = logits(model, OURS, batch)
    model.train()
    drawn: list[Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(logits(model, OURS, batch))
    assert_equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], plain)


MISTAKES: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "a mask of the other polarity": ("llama", lambda call: {"attention_mask": ~call["attention_mask"]}),
    "the padding forgotten": ("llama", lambda _: {"attention_mask": None, "is_causal": True}),
    "the order forgotten": ("llama", lambda call: {"attention_mask": call["attention_mask"][:, :, -1:]}),
    "groups tiled, not repeated": (
        "llama",
        lambda call: {name: call[name].repeat(1, 2, 1, 1) for name in ("key", "value")},
    ),
    "scores not scaled": ("llama", lambda _: {"scaling": 1.0}),
    "scores scaled twice": ("whisper", lambda _: {"scaling": None}),
    "no position bias": ("t5", lambda _: {"position_bias": None}),
    "no softcap": ("gemma2", lambda _: {"softcap": None}),
    "no sinks": ("gpt_oss", lambda _: {"s_aux": None}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_exceeds_the_tolerance(mistake: str) -> None:
    name, change = MISTAKES[mistake]

    def mistaken(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **rest: Any) -> Any:
        call = {"query": query, "key": key, "value": value, "attention_mask": attention_mask, **rest}
        return transformers_attention.attention(module, **call | change(call))

    transformers.AttentionInterface.register(WRONG, mistaken)
    transformers.AttentionMaskInterface.register(WRONG, sdpa_mask)
    ours = {dtype: logits(model, OURS, inputs(name)) for dtype, model in models(name).items()}
    wrong = logits(models(name)["float64"], WRONG, inputs(name))
    assert largest_difference(wrong, judged_logits(name)) > largest_difference(ours["float32"], ours["float64"])
