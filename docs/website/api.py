"""The pages of the API, from signatures and docstrings. Backends are read, not imported: no framework is needed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mha_spec import layer_object

if TYPE_CHECKING:
    from collections.abc import Callable

    from .markdown import Site

__all__ = ["PAGES", "write_api"]


@dataclass(frozen=True)
class Page:
    """A page of the API: objects that are documented under the name of a module."""

    title: str
    introduction: str
    module: str
    names: tuple[str, ...]
    source: str = ""
    """The module that has the docstrings, if that of `module` only dispatches to it."""


PAGES: dict[str, tuple[Page, ...]] = {
    "attention": (
        Page(
            "Attention",
            "The library of the query's array computes the result; `mha_spec.reference` has the same functions as "
            "SPEC.md writes them. The options are in the table at the end.",
            "mha_spec",
            ("attention", "attention_weights", "attention_vjp", "merge_attention", "merge_attention_vjp"),
            "mha_spec.reference",
        ),
    ),
    "packed": (
        Page(
            "Packed and paged calls",
            "Sequences packed one after the other, and keys and values in blocks; see [the guide](/packed.md).",
            "mha_spec",
            ("varlen_attention", "varlen_attention_vjp"),
            "mha_spec.reference",
        ),
    ),
    "devices": (
        Page(
            "Attention over several devices",
            "For the body of a `jax.shard_map`; see [the guide](/scaling.md).",
            "mha_spec_jax",
            ("ring_attention", "all_to_all_attention", "sharded_kv_attention"),
        ),
        Page(
            "Process groups of torch",
            "For the ranks of a group of `torch.distributed`.",
            "mha_spec_torch",
            ("ring_attention", "all_to_all_attention", "sharded_kv_attention"),
        ),
        Page("Layouts of a sequence", "", "mha_spec.sharding", ("shard_order",)),
    ),
    "layer": (
        Page(
            "The layer",
            "Projections, norms, rotary positions and a cache around attention; its functions take the options of "
            "[attention](attention.md) too.",
            "mha_spec",
            (
                "multi_head_attention",
                "multi_head_attention_and_weights",
                "multi_head_attention_weights",
                "rotary_embedding",
                "alibi_slopes",
                "alibi_bias",
            ),
            "mha_spec.reference",
        ),
        Page("Frequencies", "", "mha_spec", ("rotary_frequencies",)),
        Page("Caches", "", "mha_spec", ("KVCache", "WindowKVCache", "PagedKVCache")),
    ),
    "backends": (
        Page(
            "Backends and errors",
            "The environment variable `MHA_SPEC_BACKEND` fixes a backend when `mha_spec` is imported; without it, the "
            "type of the query's array chooses.",
            "mha_spec",
            ("backend", "backend_names", "MhaSpecError", "ArgumentValueError", "ArgumentTypeError", "BackendError"),
        ),
    ),
    "weights": (
        Page(
            "Weights of other libraries",
            "Renames, splits and transposes; see [the guide](/weights.md).",
            "mha_spec.weights",
            (
                "layouts",
                "load_weights",
                "save_weights",
                "read_safetensors",
                "write_safetensors",
                "half_split_pairs",
                "interleaved_pairs",
                "Layout",
                "LoadedLayer",
            ),
        ),
    ),
    "testing": (
        Page(
            "Assertions",
            "For the tests of a kernel at its own sizes; see [the guide](/testing.md).",
            "mha_spec_conformance.testing",
            ("assert_attention", "assert_attention_vjp", "assert_rotary", "allowance"),
        ),
    ),
}
LAYERS = {
    "torch": "backends/mha_spec_torch/module.py",
    "jax": "backends/mha_spec_jax/module.py",
    "jax.flax": "backends/mha_spec_jax/flax.py",
    "tensorflow": "backends/mha_spec_tensorflow/module.py",
    "numpy": "backends/mha_spec_numpy/module.py",
}
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes|Differs from others|Source|Example|Examples|Note):$")
TITLES = {"Args": "Arguments", "Raises": "Errors"}
ENTRIES = ("Args", "Raises", "Attributes")
DOCUMENTED = re.compile(r"`(mha_spec(?:_conformance)?(?:\.\w+)+)`")


def write_api(site: Site) -> None:
    """Write every page of the API and the page that lists them."""
    known = {f"{page.module}.{name}" for pages in PAGES.values() for page in pages for name in page.names}
    for name, pages in PAGES.items():
        text = "\n\n".join(_page(page, first=page is pages[0]) for page in pages)
        if name == "attention":
            text += "\n\n## Options\n\n" + _options_of_attention()
        if name == "layer":
            text += "\n\n" + _modules(site)
        site.write(f"api/{name}.md", _referred(text, known) + "\n")
    site.write("api/command.md", _command_line())
    names = "\n".join([*PAGES, "command"])
    listed = "\n".join(
        f"| [{pages[0].title}](/api/{name}.md) | {' '.join(f'`{name}`' for page in pages for name in page.names)} |"
        for name, pages in PAGES.items()
    )
    head = "# API reference\n\nFrom the docstrings of the installed version.\n\n| page | content |\n| --- | --- |\n"
    last = "| [The command line](/api/command.md) | `mha-spec` |"
    site.write("api/index.md", f"{head}{listed}\n{last}\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n")


def _page(page: Page, *, first: bool) -> str:
    module = importlib.import_module(page.module)
    origin = importlib.import_module(page.source or page.module)
    heading = f"{'#' if first else '##'} {page.title}\n\n{page.introduction}"
    return (
        heading
        + "\n\n"
        + "\n\n".join(_object(page, name, getattr(module, name), getattr(origin, name)) for name in page.names)
    )


def _object(page: Page, name: str, public: Any, described: Any) -> str:
    if inspect.isclass(public):
        return _class(f"{page.module}.{name}", public)
    return _directive(
        "function", f"{page.module}.{name}{_signature(public)}", _described(inspect.getdoc(described) or "")
    )


def _class(name: str, public: type) -> str:
    if issubclass(public, Exception):
        bases = ", ".join(f"`{base.__name__}`" for base in public.__bases__)
        return _directive("exception", name, f"{_described(inspect.getdoc(public) or '')}\n\nBases: {bases}.")
    members = "\n\n".join(
        _directive(
            "method" if callable(member) else "property", f"{member_name}{_method_signature(member)}", _described(text)
        )
        for member_name, member in _members(public)
        if (text := inspect.getdoc(member))
    )
    return _directive(
        "class", name + _signature(public), f"{_described(inspect.getdoc(public) or '')}\n\n{members}", outer=True
    )


def _members(public: type) -> list[tuple[str, Any]]:
    """Return the public methods and properties that a class defines, in its order."""
    members = [(name, getattr(public, name)) for name in vars(public) if not name.startswith("_")]
    return [(name, member) for name, member in members if inspect.isroutine(member) or isinstance(member, property)]


def _method_signature(member: Any) -> str:
    return (
        ""
        if isinstance(member, property)
        else re.sub(r"\((self|cls)(, |\))", r"(\2", _signature(member)).replace("(, ", "(")
    )


def _signature(function: Callable[..., Any]) -> str:
    """Return the parameters and their defaults; shapes and types are in the docstring."""
    signature = inspect.signature(function)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def _directive(kind: str, signature: str, body: str, *, outer: bool = False) -> str:
    fence = "::::" if outer else ":::"
    return f"{fence}{{py:{kind}}} {signature}\n\n{body.strip()}\n{fence}"


def _described(docstring: str) -> str:
    """Return a docstring as Markdown: its formulas as code, its sections as lists of definitions."""
    result: list[str] = []
    section, lines = "", list[str]()
    for line in [*docstring.split("\n"), "Note:"]:
        if match := SECTION.match(line):
            result.append(_section(section, "\n".join(lines)))
            section, lines = match[1], []
        else:
            lines.append(line)
    return "\n\n".join(filter(None, result))


def _section(section: str, text: str) -> str:
    if not section:
        return _paragraphs(text)
    body = inspect.cleandoc("\n" + text)
    if not body:
        return ""
    title = f"**{TITLES.get(section, section)}**"
    return f"{title}\n\n{_entries(body) if section in ENTRIES else _paragraphs(body)}"


def _entries(body: str) -> str:
    entries: list[tuple[str, list[str]]] = []
    for line in body.split("\n"):
        match = re.match(r"([\w*][\w*, ]*?): +(.*)", line)
        if match:
            entries.append((match[1], [match[2]]))
        elif entries:
            entries[-1][1].append(line.strip())
    return "\n\n".join(f"`{name}`\n: {' '.join(text).strip()}" for name, text in entries)


def _paragraphs(text: str) -> str:
    """Fence the indented blocks, which are formulas or programs."""
    result: list[str] = []
    for paragraph in re.split(r"\n{2,}", text.strip("\n")):
        if all(line.startswith("    ") or not line for line in paragraph.split("\n")):
            language = "python" if re.search(r"^ +(from|import) ", paragraph, flags=re.MULTILINE) else "text"
            code = "\n".join(line[4:] for line in paragraph.split("\n"))
            result.append(f"```{language}\n{code}\n```")
        else:
            result.append(paragraph)
    return "\n\n".join(result)


def _referred(text: str, known: set[str]) -> str:
    """Link the full names of documented objects; those of the reference are documented as those of `mha_spec`."""

    def linked(match: re.Match[str]) -> str:
        name = match[1].replace("mha_spec.reference.", "mha_spec.")
        return f"{{py:obj}}`{name}`" if name in known else match[0]

    return DOCUMENTED.sub(linked, text)


def _attribute_table(source: str, name: str) -> list[tuple[str, str]]:
    """Return the attributes of a class and the strings below them."""
    (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    table: list[tuple[str, str]] = []
    for node, following in pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            table.append((ast.unparse(node.target), " ".join(str(following.value.value).split())))
    return table


def _options_of_attention() -> str:
    source = inspect.getsource(importlib.import_module("mha_spec.arguments"))
    rows = [*_attribute_table(source, "WeightOptions"), *_attribute_table(source, "Options")]
    return _rows("option", rows)


def _rows(head: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| `{name}` | {text.replace('|', chr(92) + '|').replace('*', chr(92) + '*')} |" for name, text in rows]
    return "\n".join([f"| {head} | meaning |", "| --- | --- |", *lines])


def _modules(site: Site) -> str:
    """Describe the layer of each framework, from its source."""
    text = [
        "## Modules of the frameworks",
        "`mha_spec.backend(name).MultiHeadAttention` is a module of that framework. All take `embed`, `heads` and:",
        _rows("option", _attribute_table(inspect.getsource(layer_object), "LayerOptions")),
    ]
    for name, file in LAYERS.items():
        tree = ast.parse((site.root / file).read_text(encoding="utf-8"))
        (layer,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MultiHeadAttention"]
        text += [f"### {name}", _paragraphs(ast.get_docstring(layer) or "")]
    return "\n\n".join(text)


def _command_line() -> str:
    """Describe the commands, from the program that runs them."""
    from typer.main import get_command

    from mha_spec_conformance.commands.cli import app

    text = ["# The command line", "`mha-spec COMMAND --help` prints the same."]
    group: Any = get_command(app)
    for name, command in group.commands.items():
        text += [f"## mha-spec {name}", _paragraphs(inspect.cleandoc(command.help or ""))]
        rows = []
        for parameter in command.params:
            label = "/".join(parameter.opts) if parameter.param_type_name == "option" else parameter.name
            rows.append((label, " ".join((getattr(parameter, "help", None) or "").split())))
        text.append(_rows("argument", [row for row in rows if row[0] != "--help"]) if rows else "")
    return "\n\n".join(filter(None, text)) + "\n"
