"""Write docs/api.md from the public signatures and docstrings: ``python docs/make_api.py``.

Docstrings are Google's style in a little reStructuredText: sections end in a colon, ``code``, :func:`names`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
CONTENTS = {
    "Functions": [
        "otfuse.sinkhorn_attend",
        "otfuse.sinkhorn",
        "otfuse.sinkhorn_attend_varlen",
        "otfuse.similarity_matrix",
        "otfuse.ot_alignment_loss",
        "otfuse.backends",
    ],
    "Results and errors": ["otfuse.SinkhornAttendOutput", "otfuse.SinkhornOutput", "otfuse.BackendError"],
    "Modules": ["otfuse.nn.OTAttention", "otfuse.nn.OTFusion", "otfuse.nn.OTFusionOutput"],
    "For tests and benchmarks": [
        "otfuse.testing.clustered_tokens",
        "otfuse.testing.specified_sinkhorn",
        "otfuse.testing.specified_attend",
        "otfuse.testing.per_item_log_domain",
        "otfuse.testing.assert_as_accurate_as_reference",
        "otfuse.testing.references",
        "otfuse.testing.reordered",
    ],
    "Pictures": [
        "otfuse.viz.lift",
        "otfuse.viz.preferred_pairs",
        "otfuse.viz.plan_heatmap",
        "otfuse.viz.plan_lines",
        "otfuse.viz.alignment_figure",
        "otfuse.viz.Span",
        "otfuse.viz.Pair",
    ],
}
HEAD = """\
# API

Made by `docs/make_api.py` from the docstrings: change those, then run `make docs`.

Letters: B batch, N tokens of `x`, M tokens of `y`, D features. The words are explained in
[concepts](concepts.md), `grad` in [gradients](gradients.md), `backend` in [backends](backends.md).
"""
SECTIONS = ("Args", "Returns", "Raises", "Example", "Source")


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in CONTENTS.items():
        parts.append(f"{title}:\n\n" + "\n".join(f"- [`{name}`](#{_anchor(name)})" for name in names))
    for title, names in CONTENTS.items():
        parts.append(f"## {title}")
        parts += [_entry(name) for name in names]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def find(name: str) -> Any:
    """The object of a dotted name."""
    module, _, member = name.rpartition(".")
    return getattr(importlib.import_module(module), member)


def _entry(name: str) -> str:
    thing = find(name)
    parts = [f"### `{name}`"]
    if inspect.isclass(thing) and hasattr(thing, "_fields"):
        parts += [_prose(inspect.getdoc(thing) or ""), _fields(thing)]
    else:
        parts += [_signature(name, thing), _docstring(inspect.getdoc(thing) or "")]
    if inspect.isclass(thing) and "forward" in vars(thing):
        parts += [_signature("forward", thing.forward), _docstring(inspect.getdoc(thing.forward) or "")]
    return "\n\n".join(part for part in parts if part)


def _signature(name: str, thing: Any) -> str:
    """On one line, or with a line for each parameter; none for an exception."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return ""
    signature = inspect.signature(thing)
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = json.dumps(parameter.default) if isinstance(parameter.default, str) else repr(parameter.default)
        given = "" if parameter.default is parameter.empty else f" = {default}"
        parts.append(f"{parameter.name}: {parameter.annotation}{given}")
    inside, short = ", ".join(parts), name.rsplit(".", 1)[-1]
    end = "" if inspect.isclass(thing) else f" -> {signature.return_annotation}"
    if len(f"{short}({inside}){end}") > 100:
        inside = "\n" + "".join(f"    {part},\n" for part in parts)
    return f"```text\n{short}({inside}){end}\n```"


def _docstring(text: str) -> str:
    """Prose, then each section under its bold name."""
    blocks: list[tuple[str, list[str]]] = [("", [])]
    for line in text.splitlines():
        title, _, rest = line.partition(":")
        if title in SECTIONS:
            blocks.append((title, [rest.strip()] if rest.strip() else []))
        else:
            blocks[-1][1].append(line)
    return "\n\n".join(_section(title, textwrap.dedent("\n".join(lines)).strip("\n")) for title, lines in blocks)


def _section(title: str, body: str) -> str:
    if title == "":
        return _prose(body)
    if title == "Source":
        return f"**{title}**: {_prose(body)}"
    if title == "Example":
        return f"**{title}**\n\n```pycon\n{body}\n```"
    return f"**{title}**\n\n{_items(body) if title in ('Args', 'Raises') else _prose(body)}"


def _items(body: str) -> str:
    """``name: what it is`` with deeper lines going on, as a list."""
    items = []
    for line in body.splitlines():
        if line.startswith(" ") and items:
            items[-1] += f" {line.strip()}"
        elif line:
            name, _, what = line.partition(": ")
            items.append(f"- `{name}`: {what}")
    return "\n".join(textwrap.fill(_prose(item), 112, subsequent_indent="  ", break_long_words=False) for item in items)


def _prose(text: str) -> str:
    text = re.sub(r":(?:func|class):`([\w.]+)`", _link, text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _link(match: re.Match[str]) -> str:
    every = [name for names in CONTENTS.values() for name in names]
    full = [name for name in every if name.rsplit(".", 1)[-1] == match[1].rsplit(".", 1)[-1]]
    return f"[`{match[1]}`](#{_anchor(full[0])})" if full else f"`{match[1]}`"


def _anchor(name: str) -> str:
    """What GitHub makes of a heading that is one dotted name."""
    return name.replace(".", "").lower()


def _fields(thing: Any) -> str:
    """A NamedTuple's fields with their types and the comments beside them."""
    rows = []
    for line in inspect.getsource(thing).splitlines():
        if match := re.match(r"    (\w+): ([\w| ]+?)(?:\s+# (.*))?$", line):
            name, kind, what = match.groups()
            rows.append(f"| `{name}` | `{kind}` | {what or ''} |".replace(" | None`", " or None`"))
    return "\n".join(["| field | type | |", "|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE}")
