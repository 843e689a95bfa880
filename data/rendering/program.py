"""A chat template as the Jinja program that it is, run as transformers documents it.

Rendered by jinja2 itself and not by `apply_chat_template`, which has no public way to fix the date
and treats template arguments differently from version to version. The environment is the
documented one: sandboxed, `trim_blocks` and `lstrip_blocks`, loop controls, the `generation` tag,
`tojson` that keeps Unicode, `raise_exception` and `strftime_now`. A test compares the text with
`apply_chat_template`'s over real templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, NoReturn

from jinja2 import Template, meta, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# The date that Llama 3.2's own template falls back to. Part of the rendering version.
TODAY = datetime(2024, 7, 26, 12, 0, 0)
# What a template raises for messages it doesn't accept: an error of its own, or Python's for a
# field that is missing or has an unexpected type, or what the sandbox refuses to compute.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's turns; it writes its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

    def write(self, caller: Callable[[], str]) -> str:
        return caller()


def run_template(
    source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """The text that a template makes of messages. Raises one of `TEMPLATE_ERRORS`.

    Fields that are None count as absent, as they do in data.
    """
    present = [{key: v for key, v in message.items() if v is not None} for message in messages]
    return _compiled(source).render({"documents": None, **variables, "messages": present})


@lru_cache(maxsize=64)
def template_variables(source: str) -> frozenset[str]:
    """The names that a template reads and does not set: its arguments."""
    environment = _environment()
    return frozenset(meta.find_undeclared_variables(environment.parse(source))) - {
        *environment.globals
    }


@lru_cache(maxsize=64)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja's own escaping of HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
