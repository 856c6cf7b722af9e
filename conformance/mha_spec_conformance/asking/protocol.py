"""The messages between the runner and the program of a target, as docs/protocol.md describes them.

A message is a JSON object on a line. This module converts questions, answers and claims to messages and back; it
checks every message that it reads, because a target can write anything.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy

from mha_spec import SPEC_VERSION
from mha_spec.arrays import FLOATING
from mha_spec_conformance.suite.functions import FUNCTIONS
from mha_spec_conformance.suite.text import one_line, printable, text_of
from mha_spec_conformance.targets.claims import PROFILES, Claims
from mha_spec_conformance.targets.conversion import LIBRARIES, holds_numbers
from mha_spec_conformance.targets.declarations import (
    OF_LAYOUT,
    TargetError,
    declared_conventions,
    declared_layout,
    one_of,
)

from . import files
from .question import FURTHER, Answer, Further, Question, Raised, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    Message = dict[str, Any]

__all__ = [
    "MOST_LINE_BYTES",
    "PROTOCOL",
    "ProtocolError",
    "answer_from",
    "answer_message",
    "claims_from",
    "claims_message",
    "hello_message",
    "line_of",
    "message_from",
    "number_of",
    "question_from",
    "question_message",
]

PROTOCOL = "mha-spec-protocol/1"

MOST_LINE_BYTES = 2**20
"""The length of a line."""

MOST_SECONDS = 1e9
"""The time of a call that an answer may name."""

KINDS = ("returned", "unsupported", "raised", "malformed", "lost", "internal")
KINDS_OF_FURTHER = ("returned", "unsupported", "raised", "malformed")


class ProtocolError(Exception):
    """A line is not a message of the protocol."""


def line_of(message: Message) -> bytes:
    """Write a message as a line."""
    return json.dumps(message, allow_nan=False, default=_plain).encode() + b"\n"


def message_from(line: bytes) -> Message:
    """Read a message from a line.

    Raises:
        ProtocolError: The line is too long, or is not a JSON object with the member `message`.
    """
    if len(line) > MOST_LINE_BYTES:
        raise ProtocolError(f"wrote a line of more than {MOST_LINE_BYTES} bytes: {_shown(line)}")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"wrote a line that is not JSON: {_shown(line)}") from error
    if not isinstance(message, dict) or not isinstance(message.get("message"), str):
        raise ProtocolError(f"wrote a line that is not a message: {_shown(line)}")
    return message


def _shown(line: bytes) -> str:
    return one_line(line[:200].decode(errors="replace"))


def number_of(message: Message, kind: str) -> int:
    """Return the number of a message of the kind "question" or "answer".

    Raises:
        ProtocolError: The message has another kind, or its number is not an integer.
    """
    number = message.get("number")
    if message["message"] != kind or isinstance(number, bool) or not isinstance(number, int):
        raise ProtocolError(f"wrote a message that is not a numbered {kind}: {one_line(message, 200)}")
    return number


def hello_message() -> Message:
    """Begin a conversation."""
    return {"message": "hello", "protocol": PROTOCOL, "spec_version": SPEC_VERSION}


def claims_message(claims: Claims) -> Message:
    """Reply to `hello` with the claims."""
    return {
        "message": "claims",
        "protocol": PROTOCOL,
        "functions": {name: list(words) for name, words in claims.keywords.items()},
        "dtypes": list(claims.dtypes),
        "arrays": claims.arrays,
        "profile": claims.profile,
        "conventions": dict(claims.conventions),
        "registered": claims.registered,
        "versions": dict(claims.versions),
        "hardware": claims.hardware,
        "further": list(claims.further),
        "unclaimed": list(claims.unclaimed),
        **{name: getattr(claims, name) for name in OF_LAYOUT},
    }


def claims_from(message: Message, name: str, *, trusted: bool) -> Claims:
    """Read the reply to `hello`; only a trusted program may call itself a registered backend.

    Raises:
        TargetError: The program refuses, or its claims are wrong; the message is a single line.
    """
    if message["message"] == "refusal":
        raise TargetError(one_line(message.get("reason", "the program refuses and gives no reason")))
    if message["message"] != "claims" or message.get("protocol") != PROTOCOL:
        raise TargetError(f"target {name} must reply to hello with claims of {PROTOCOL}, received {one_line(message)}")
    keywords = _keywords_from(message.get("functions"), name)
    return Claims(
        name=name,
        keywords=keywords,
        **declared_layout({key: message.get(key, default) for key, default in OF_LAYOUT.items()}, keywords, name),
        dtypes=_dtypes_from(message.get("dtypes"), name),
        arrays=one_of("arrays", message.get("arrays", "numpy"), LIBRARIES, name),
        profile=one_of("profile", message.get("profile", "standard"), PROFILES, name),
        conventions=declared_conventions(message.get("conventions", {})),
        registered=trusted and message.get("registered") is True,
        versions=_texts(message.get("versions")),
        hardware=one_line(message.get("hardware", "cpu"), 200),
        further=_among(message.get("further"), FURTHER),
        unclaimed=_among(message.get("unclaimed"), keywords),
    )


def _keywords_from(functions: object, name: str) -> dict[str, tuple[str, ...]]:
    """Read the options of each function that a target called `name` has."""
    if not isinstance(functions, dict) or not functions or not all(map(_is_names, functions.values())):
        raise TargetError(
            f"target {name}: `functions` must map names to lists of options, received {one_line(functions)}"
        )
    return {
        one_of("functions", function, tuple(FUNCTIONS), name): tuple(words) for function, words in functions.items()
    }


def _dtypes_from(dtypes: object, name: str) -> tuple[str, ...]:
    """Read the dtypes of a target called `name`, in the order of the suite."""
    if not isinstance(dtypes, list) or not _is_names(dtypes) or not dtypes:
        raise TargetError(f"target {name}: `dtypes` must be a list of names, received {one_line(dtypes)}")
    claimed = {one_of("dtypes", dtype, FLOATING, name) for dtype in dtypes}
    return tuple(dtype for dtype in FLOATING if dtype in claimed)


def question_message(question: Question, number: int, folder: Path, further: tuple[str, ...]) -> Message:
    """Ask a question whose arrays lie in the folder, with those of its further calls that the program can make."""
    return {
        "message": "question",
        "number": number,
        "id": question.id,
        "function": question.function,
        "dtype": question.dtype,
        "arrays": str(folder / f"{number}.question"),
        "options": {name: _encoded(value) for name, value in question.options.items()},
        "outputs": list(question.outputs),
        "answer": str(folder / f"{number}.answer"),
        "most_bytes": question.most_bytes,
        "features": list(question.features),
        "clauses": list(question.clauses),
        "tags": list(question.tags),
        "host": dict(question.host),
        "placed": dict(question.placed),
        "sampled": {
            name: {"shape": sample.shape, "rows": sample.rows.tolist(), "width": sample.width}
            for name, sample in question.sampled.items()
        },
        "further": [name for name in question.further if name in further],
    }


def question_from(message: Message, arrays: Mapping[str, numpy.ndarray]) -> Question:
    """Read a question of the runner, which is trusted."""
    return Question(
        id=message["id"],
        function=message["function"],
        dtype=message["dtype"],
        arrays=arrays,
        options={name: _decoded(value) for name, value in message["options"].items()},
        outputs=tuple(message["outputs"]),
        features=tuple(message["features"]),
        clauses=tuple(message["clauses"]),
        tags=tuple(message["tags"]),
        further=tuple(message["further"]),
        host=message["host"],
        placed=message["placed"],
        sampled={
            name: Sample(tuple(sample["shape"]), numpy.asarray(sample["rows"], numpy.int64), sample["width"])
            for name, sample in message.get("sampled", {}).items()
        },
        most_bytes=message["most_bytes"],
    )


def _encoded(value: object) -> object:
    """Write an option as JSON, which has neither NaN nor infinity nor tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(float(value))}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        return {name: _encoded(item) for name, item in value.items()}
    return value


def _plain(value: object) -> object:
    """Write a scalar of NumPy as the number that it holds."""
    if isinstance(value, numpy.generic):
        return value.item()
    raise TypeError(f"a message cannot hold {type(value).__name__}")


def _decoded(value: object) -> object:
    """Read an option: a list becomes a tuple, and {"number": "nan"} a number that JSON lacks."""
    if isinstance(value, list):
        return tuple(_decoded(item) for item in value)
    if isinstance(value, dict):
        if value.keys() == {"number"}:
            return float(value["number"])
        return {name: _decoded(item) for name, item in value.items()}
    return value


def answer_message(
    answer: Answer, number: int, path: Path, most_bytes: int, sampled: Mapping[str, Sample] | None = None
) -> Message:
    """Write the arrays of an answer to its file, of sampled outputs the rows alone, and return its message."""
    outputs = {
        name: sampled[name].of(array) if sampled and name in sampled and array.shape == sampled[name].shape else array
        for name, array in answer.outputs.items()
    }
    arrays, described = _split(outputs, "", most_bytes)
    further: dict[str, Message] = {}
    for name, call in answer.further.items():
        of_call, of_call_described = _split(call.outputs, f"{name}/", most_bytes)
        arrays |= of_call
        further[name] = {"kind": call.kind, "written": list(call.written), "described": of_call_described}
        further[name] |= {} if call.reason is None else {"reason": call.reason}
    if answer.kind == "returned":
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, arrays)
    message: Message = {
        "message": "answer",
        "number": number,
        "kind": answer.kind,
        "seconds": answer.seconds,
        "written": list(answer.written),
        "overwritten": list(answer.overwritten),
        "described": described,
        "further": further,
    }
    optional = {"reason": answer.reason, "foreign": answer.foreign, "raised": answer.raised and _raised(answer.raised)}
    return message | {name: value for name, value in optional.items() if value is not None}


def _raised(raised: Raised) -> Message:
    return {"classes": list(raised.classes), "message": raised.message, "where": raised.where}


def _split(
    outputs: Mapping[str, numpy.ndarray], prefix: str, most_bytes: int
) -> tuple[dict[str, numpy.ndarray], dict[str, Message]]:
    """Separate the arrays that a file can hold from the others, which are described."""
    arrays: dict[str, numpy.ndarray] = {}
    described: dict[str, Message] = {}
    for name, array in outputs.items():
        if files.can_hold(array, most_bytes):
            arrays[prefix + name] = array
        else:
            described[name] = {"shape": list(array.shape), "dtype": array.dtype.name}
    return arrays, described


def answer_from(message: Message, question: Question, path: Path) -> Answer:
    """Read the answer to a question, and its arrays; the outputs are those that the question asks for.

    Raises:
        ProtocolError: The message is not an answer of the protocol.
    """
    kind, seconds = message.get("kind"), message.get("seconds", 0.0)
    if kind not in KINDS or not _is_time(seconds):
        raise ProtocolError(f"wrote a message that is not an answer: {one_line(message, 200)}")
    reason = None if message.get("reason") is None else one_line(message["reason"])
    if kind != "returned":
        return Answer(kind, reason=reason or "it gives no reason", raised=_raised_from(message), seconds=float(seconds))
    try:
        arrays = files.read(path, question.most_bytes)
        outputs = _outputs(message, question, arrays, "")
        further = _further_from(message, question, arrays)
    except (files.FileError, _Missing) as error:
        return Answer("malformed", reason=one_line(error), seconds=float(seconds))
    return Answer(
        "returned",
        outputs,
        written=_among(message.get("written"), question.arrays),
        further=further,
        foreign=None if message.get("foreign") is None else one_line(message["foreign"], 200),
        seconds=float(seconds),
        overwritten=_among(message.get("overwritten"), question.outputs),
    )


def _is_time(seconds: object) -> bool:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return False
    return 0 <= seconds <= MOST_SECONDS


class _Missing(Exception):
    """An output is in neither the file nor the message."""


def _raised_from(message: Message) -> Raised | None:
    raised = message.get("raised")
    if not isinstance(raised, dict) or not _is_names(raised.get("classes")) or not raised["classes"]:
        return None
    where = raised.get("where")
    text = printable(text_of(raised.get("message", "")), keep="\n")
    classes = tuple(one_line(name, 200) for name in raised["classes"][:100])
    return Raised(classes, text, None if where is None else one_line(where, 500))


def _further_from(message: Message, question: Question, arrays: Mapping[str, numpy.ndarray]) -> dict[str, Further]:
    """Read the answers to further calls that the question asks for."""
    answers = message.get("further")
    further: dict[str, Further] = {}
    for name in question.further:
        call = answers.get(name) if isinstance(answers, dict) else None
        if not isinstance(call, dict) or call.get("kind") not in KINDS_OF_FURTHER:
            continue
        if call["kind"] == "returned":
            outputs = _outputs(call, question, arrays, f"{name}/")
            further[name] = Further("returned", outputs, written=_among(call.get("written"), question.arrays))
        else:
            further[name] = Further(call["kind"], reason=one_line(call.get("reason", "it gives no reason")))
    return further


def _outputs(
    message: Message, question: Question, arrays: Mapping[str, numpy.ndarray], prefix: str
) -> dict[str, numpy.ndarray]:
    described = message.get("described")
    outputs: dict[str, numpy.ndarray] = {}
    for name in question.outputs:
        if prefix + name in arrays:
            outputs[name] = _whole(arrays[prefix + name], question.sampled.get(name))
        elif isinstance(described, dict) and name in described:
            outputs[name] = _stand_in(name, described[name])
        else:
            raise _Missing(f"`{name}` is missing in the file of the answer")
    return outputs


def _whole(array: numpy.ndarray, sample: Sample | None) -> numpy.ndarray:
    """Return an output of which perhaps only the sampled rows were written."""
    return array if sample is None or not sample.fits(array.shape) else sample.spread(array)


def _stand_in(name: str, description: Any) -> numpy.ndarray:
    """Make an array of the described shape and dtype, without memory, because its values are not judged."""
    try:
        shape, dtype = description["shape"], description["dtype"]
        if not _is_name(dtype) or not holds_numbers(numpy.dtype(dtype)):
            raise _Missing(f"`{name}` must be an array of numbers, received dtype={one_line(dtype, 200)}")
        return numpy.broadcast_to(numpy.zeros((), dtype), shape)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise _Missing(f"`{name}` must be an array, received {one_line(description, 200)}") from error


def _is_name(dtype: object) -> bool:
    """Tell whether a dtype is a name; NumPy also reads codes of a letter, and expressions such as "(2,)f4"."""
    return isinstance(dtype, str) and dtype.isidentifier() and len(dtype) > 1


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _names(value: object) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()


def _among(value: object, allowed: Iterable[str]) -> tuple[str, ...]:
    """Keep the names that are known, in the order in which they are known."""
    names = _names(value)
    return tuple(name for name in allowed if name in names)


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {one_line(name, 200): one_line(text, 200) for name, text in list(value.items())[:100]}
