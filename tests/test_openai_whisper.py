"""OpenAI's Whisper, with random weights of small sizes, compared with ours.

Its weights in the example's model give its logits on every backend, at once and token by token; and its own model and
decoding give the same logits with our layer as its attention.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import listener
import numpy
import pytest
import torch
import transformer
import whisper
from support.comparisons import assert_same
from support.libraries import converted, with_float64
from whisper.decoding import PyTorchInference
from whisper.model import ModelDimensions, MultiHeadAttention, Whisper, disable_sdpa

import mha_spec
from mha_spec.arrays import library_of
from mha_spec.weights import load_weights
from mha_spec_conformance.targets.conversion import LIBRARIES, to_library, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, FRAMES, TOKENS, PROMPT = 2, 21, 7, 3
DIMENSIONS = ModelDimensions(
    n_mels=5,
    n_audio_ctx=11,
    n_audio_state=42,
    n_audio_head=3,
    n_audio_layer=2,
    n_vocab=17,
    n_text_ctx=13,
    n_text_state=42,
    n_text_head=7,
    n_text_layer=2,
)


class Problem(NamedTuple):
    model: Any
    mel: torch.Tensor
    tokens: torch.Tensor


@pytest.fixture(autouse=True)
def their_types_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let their model compute in float64: it rounds norms, scores and logits to float32 by `Tensor.float`."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)


def made(dimensions: ModelDimensions) -> Any:
    torch.manual_seed(7)
    model = Whisper(dimensions).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def problem() -> Problem:
    rng = numpy.random.default_rng(7)
    mel = torch.from_numpy(rng.standard_normal((BATCH, DIMENSIONS.n_mels, FRAMES)))
    tokens = torch.from_numpy(rng.integers(DIMENSIONS.n_vocab, size=(BATCH, TOKENS)))
    return Problem(made(DIMENSIONS), mel, tokens)


def parameters(model: Any) -> dict[str, Any]:
    """Return their weights under the names of the example."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def pair(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def transposed(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        weight, bias = pair(name)
        return weight.T.reshape(-1, len(bias)), bias

    def block(name: str, heads: int, *attentions: str) -> dict[str, Any]:
        ours = dict(zip(attentions, ("attention", "cross"), strict=False))
        loaded = {
            ours[theirs]: load_weights(state, "whisper_openai", heads=heads, prefix=f"{name}.{theirs}")
            for theirs in attentions
        }
        norms = [f"{name}.{part}_ln" for part in (*attentions, "mlp")]
        (w_1, b_1), (w_2, b_2) = transposed(f"{name}.mlp.0"), transposed(f"{name}.mlp.2")
        feeds = {"w_1": w_1, "b_1": b_1, "w_2": w_2, "b_2": b_2}
        return {**loaded, **feeds, **{f"norm_{number}": pair(norm) for number, norm in enumerate(norms, 1)}}

    sizes = model.dims
    return {
        "conv_1": transposed("encoder.conv1"),
        "conv_2": transposed("encoder.conv2"),
        "encoder": [block(f"encoder.blocks.{n}", sizes.n_audio_head, "attn") for n in range(sizes.n_audio_layer)],
        "norm_encoder": pair("encoder.ln_post"),
        "embedding": state["decoder.token_embedding.weight"],
        "positions": state["decoder.positional_embedding"],
        "decoder": [
            block(f"decoder.blocks.{n}", sizes.n_text_head, "attn", "cross_attn") for n in range(sizes.n_text_layer)
        ],
        "norm_decoder": pair("decoder.ln"),
    }


class Ours(NamedTuple):
    """The example's model with their weights, and its inputs."""

    params: dict[str, Any]
    memory: listener.Memory
    tokens: Any

    def at_once(self) -> Any:
        x = listener.decode(self.params, listener.embed(self.params, self.tokens), self.memory)
        return listener.logits(self.params, x)

    def token_by_token(self) -> list[Any]:
        """Decode a prompt at once, and then token by token, with a cache."""
        caches, outputs = transformer.start(self.params, self.memory, TOKENS), []
        for first, end in pairwise([0, *range(PROMPT, TOKENS + 1)]):
            x = listener.embed(self.params, self.tokens[:, first:end], first)
            x, caches = listener.decode_cached(self.params, x, caches)
            outputs.append(listener.logits(self.params, x))
        return outputs

    def weights(self) -> Any:
        return listener.cross_weights(self.params, listener.embed(self.params, self.tokens), self.memory)


def ours(problem: Problem, library: str, dtype: str, ask: Callable[[Ours], Any]) -> numpy.ndarray:
    """Ask the example's model on the backend of `library`."""
    with with_float64(library):
        arrays = parameters(problem.model), problem.mel.mT.numpy(), problem.tokens.numpy().astype("int32")
        params, frames, tokens = converted(arrays, library, dtype)
        answer = ask(Ours(params, listener.encode(params, frames), tokens))
        arrays = answer if isinstance(answer, list) else [answer]
        assert {library_of(array) for array in arrays} == {library}
        return numpy.concatenate([to_numpy(array) for array in arrays], axis=1)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("ask", [Ours.at_once, Ours.token_by_token], ids=["at once", "token by token"])
def test_their_weights_give_their_logits(problem: Problem, library: str, ask: Callable[[Ours], Any]) -> None:
    theirs = problem.model(problem.mel, problem.tokens).numpy()
    assert_same(lambda dtype: ours(problem, library, dtype, ask), theirs)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_weights_of_their_alignment_heads_are_ours(problem: Problem, library: str) -> None:
    assert set(problem.model.alignment_heads.indices()[0].tolist()) == {DIMENSIONS.n_text_layer - 1}
    scores: list[torch.Tensor] = []
    block = problem.model.decoder.blocks[-1]
    hook = block.cross_attn.register_forward_hook(lambda _module, _inputs, outputs: scores.append(outputs[-1]))
    with disable_sdpa():  # as their `find_alignment` does
        problem.model(problem.mel, problem.tokens)
    hook.remove()
    assert_same(lambda dtype: ours(problem, library, dtype, Ours.weights), scores[0].softmax(-1).numpy())


class Held(NamedTuple):
    """A cache of ours among theirs: their decoder asks the first of them for its length."""

    cache: mha_spec.KVCache
    shape: tuple[int, int]


def replaced(library: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the method `forward` of their layer, computed by ours on the backend of `library`."""

    def forward(
        self: MultiHeadAttention,
        x: torch.Tensor,
        xa: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        kv_cache: dict[Any, Any] | None = None,
    ) -> tuple[torch.Tensor, None]:
        with with_float64(library):
            params = load_weights(self.state_dict(), "whisper_openai", heads=self.n_head)
            params = {name: to_library(tensor.numpy(), library) for name, tensor in params.items()}
            query = to_library(x.numpy(), library)
            source = query if xa is None else to_library(xa.numpy(), library)
            options: dict[str, Any] = {"causal": mask is not None}
            if kv_cache is None:
                output = mha_spec.multi_head_attention(query, source, source, params, **options)
            else:
                output = attended(query, source, params, self, kv_cache, crosses=xa is not None, **options)
            assert library_of(output) == library
            return torch.tensor(to_numpy(output)), None

    return forward


def attended(
    query: Any,
    source: Any,
    params: dict[str, Any],
    layer: MultiHeadAttention,
    caches: dict[Any, Any],
    *,
    crosses: bool,
    **options: Any,
) -> Any:
    """Attend with a cache of ours, which is kept among theirs; the audio is projected in the first step alone."""
    batch, length, size = len(query), source.shape[1], params["w_k"].shape[-1]
    if layer in caches:
        cache, (_, before) = caches[layer]
        source = None if crosses else source
    else:
        capacity, before = length if crosses else DIMENSIONS.n_text_ctx, 0
        cache = mha_spec.KVCache.empty(batch, layer.n_head, capacity, size, like=query)
    output, cache = mha_spec.multi_head_attention(query, source, source, params, cache=cache, **options)
    caches[layer] = Held(cache, (batch, before + length))
    return output


def decoded(model: Any, mel: torch.Tensor, tokens: torch.Tensor) -> numpy.ndarray:
    """Decode greedily as theirs does, first a prompt and then token by token with a cache; return all logits."""
    inference, features, logits = PyTorchInference(model, PROMPT), model.encoder(mel), []
    tokens = tokens[:, :PROMPT]
    while tokens.shape[1] < DIMENSIONS.n_text_ctx:
        logits.append(inference.logits(tokens, features))
        tokens = torch.cat([tokens, logits[-1][:, -1:].argmax(-1)], dim=1)
    inference.cleanup_caching()
    return torch.cat(logits, dim=1).numpy()


@pytest.mark.parametrize("library", LIBRARIES)
def test_their_decoding_with_our_attention_gives_their_logits(
    problem: Problem, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = decoded(*problem)
    assert theirs.shape == (BATCH, DIMENSIONS.n_text_ctx - 1, DIMENSIONS.n_vocab)
    monkeypatch.setattr(MultiHeadAttention, "forward", replaced(library))
    single = made(DIMENSIONS).to(torch.float32)
    results = {
        "float64": decoded(*problem),
        "float32": decoded(single, problem.mel.to(torch.float32), problem.tokens),
    }
    assert_same(results.__getitem__, theirs)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of their list of tokens
def test_their_transcription_with_our_attention_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    english = ModelDimensions(**{**vars(DIMENSIONS), "n_vocab": 51864})
    model = made(english).to(torch.float32)
    mel = torch.randn(BATCH, english.n_mels, FRAMES)
    theirs = whisper.decode(model, mel, language="en", fp16=False)
    monkeypatch.setattr(MultiHeadAttention, "forward", replaced("torch"))
    results = whisper.decode(model, mel, language="en", fp16=False)
    assert isinstance(theirs, list)
    assert isinstance(results, list)
    assert [result.tokens for result in results] == [result.tokens for result in theirs]
    assert all(result.tokens for result in results)
