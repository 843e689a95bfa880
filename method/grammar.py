"""A method in one line of text, for `train` and `compare` alike:

    METHOD[:ref/ref…][+weighting][+reliable]

`parse_method` reads the text, lets flags override its parts, and returns a frozen `Method`
(`objective.py`), which checks its parts and computes weights, targets and losses. `METHODS` has
the defaults of what the text names, the dataclass `Method` those of everything else.

For `compare` alone, means of weights, which are not trained themselves (`parse_average`):

    soup[:ref/ref…][+vaw]    the mean of the policies that DPO with each reference gives
    merge[:ref/ref…]         the mean of the references' own weights
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from ..errors import UserError
from .objective import SEPARATE, Method
from .weightings import fixed_weights


class MethodDefaults(NamedTuple):
    """The parts that a method's name stands for."""

    kind: str
    weighting: str = "uniform"
    epsilon: float | None = None


FORM = "METHOD[:ref/ref…][+weighting][+reliable]"
METHODS = {
    "mrpo": MethodDefaults("harmonic", "arwc", 0.1),
    "multi-dpo": MethodDefaults(SEPARATE),
    "dpo": MethodDefaults("harmonic"),
    "harmonic": MethodDefaults("harmonic"),
    "geometric": MethodDefaults("geometric"),
    "arithmetic": MethodDefaults("arithmetic"),
}


class Average(NamedTuple):
    """A mean of weights, with every reference named."""

    name: str  # of `AVERAGES`
    references: tuple[str, ...]
    weighting: str  # of `AVERAGES[name]`

    def __str__(self) -> str:
        weighted = "" if self.weighting == "uniform" else f"+{self.weighting}"
        return f"{self.name}:{'/'.join(self.references)}{weighted}"


AVERAGES = {"soup": ("uniform", "vaw"), "merge": ("uniform",)}  # with their weightings


def parse_method(
    text: str,
    aliases: Sequence[str],
    *,
    reference_kind: str | None = None,
    weighting: str | None = None,
    weights: str | None = None,
    epsilon: float | Literal["none"] | None = None,
    **options: Any,
) -> Method:
    """Read `METHOD[:ref/ref…][+weighting][+reliable]`; keywords that are not None override parts.

    Args:
        text: for example "mrpo", "mrpo:llama/qwen+fitted", "dpo:qwen", "multi-dpo+vaw".
        aliases: the run's references, in the order of the scores' columns; the first is the base.
            Without a list in the text a method uses all of them, and dpo the first. Under
            +reliable dpo is held to the first that it names; the others, by default all that the
            run has, judge the labels.
        reference_kind: "harmonic", "geometric" or "arithmetic".
        weighting: one of `WEIGHTINGS`.
        weights: one number for each reference of the method, as "0.5,0.3,0.2"; implies the
            weighting "fixed".
        epsilon: CTRO's half-width, or "none".
        options: other fields of `Method`, such as beta.

    Raises `UserError` for whatever is unknown or does not go together.

    >>> method = parse_method("mrpo:llama/qwen", ["mistral", "llama", "qwen"])
    >>> str(method), method.columns, method.kind, method.epsilon
    ('mrpo:llama/qwen+arwc', (1, 2), 'harmonic', 0.1)
    >>> str(parse_method("dpo", ["llama", "qwen"]))
    'dpo:llama'
    >>> str(parse_method("dpo:qwen+reliable", ["llama", "qwen"]))
    'dpo:qwen/llama+reliable'
    """
    refuse_average(text)
    name, named, text_weighting, reliable = _split(text)
    default = METHODS[name]
    references = named or tuple(aliases[:1] if name == "dpo" else aliases)
    _check_references(text, name, references, aliases, reliable)
    if reference_kind is not None and name == "multi-dpo":
        raise UserError(
            f"method {text!r} averages losses and has no reference kind; "
            f"leave out --reference-kind {reference_kind}, or use the method {reference_kind}"
        )
    implied = default.weighting if weights is None else "fixed"
    if name == "dpo" and reliable:
        if named[1:] == ():
            references += tuple(alias for alias in aliases if alias not in references)
        implied = "base"
        if (weighting or text_weighting or implied) != "base" or weights is not None:
            raise UserError(
                f"method {text!r}: dpo is held to one reference and has no weights; "
                "leave out the weighting, or use geometric+reliable"
            )
    method = Method(
        name=name,
        references=references,
        columns=tuple(list(aliases).index(reference) for reference in references),
        kind=reference_kind or default.kind,
        weighting=weighting or text_weighting or implied,
        epsilon=default.epsilon if epsilon is None else None if epsilon == "none" else epsilon,
        reliable=reliable,
        **options,
    )
    if weights is not None:
        return replace(method, weights=_fixed(text, method, weights))
    if method.weighting == "fixed":
        raise UserError("weighting fixed needs --weights, for example --weights 0.5,0.3,0.2")
    return method


def parse_average(text: str, aliases: Sequence[str]) -> Average | None:
    """Read `soup[:ref/ref…][+vaw]` or `merge[:ref/ref…]`; None for a method that is trained.

    Without a list in the text it is over all of `aliases`. Raises `UserError` for whatever is
    unknown or does not go together.

    >>> str(parse_average("soup+vaw", ["llama", "qwen"]))
    'soup:llama/qwen+vaw'
    >>> parse_average("mrpo", ["llama", "qwen"])
    """
    name, named, weighting, reliable = _split(text)
    if name not in AVERAGES:
        return None
    references, known = named or tuple(aliases), AVERAGES[name]
    _check_references(text, name, references, aliases, reliable)
    if reliable or (weighting or "uniform") not in known:
        part, others = "reliable" if reliable else weighting, known[1:]
        takes = f"takes +{' or +'.join(others)}, or nothing" if others else "is uniform"
        raise UserError(f"method {text!r}: {name} {takes}; leave out +{part}")
    if name == "merge" and len(references) < 2:
        raise UserError(
            f"method {text!r} is the reference {references[0]} itself; name two or more"
        )
    return Average(name, references, weighting or "uniform")


def average_name(text: str) -> str | None:
    """Which of `AVERAGES` a method is, None where it is trained or unknown."""
    name = re.split("[:+]", text)[0]
    return name if name in AVERAGES else None


def refuse_average(text: str) -> None:
    """Raise `UserError` for a soup or a merge, where a method to train on is asked for."""
    if name := average_name(text):
        raise UserError(
            f"method {text!r}: a {name} is a mean of weights and made by compare, not trained; run "
            f"`mrpo compare --methods {text}`"
        )


def named_references(text: str) -> tuple[str, ...]:
    """The references that the text itself names, none if it leaves them to the run.

    >>> named_references("mrpo:llama/qwen+arwc"), named_references("mrpo")
    (('llama', 'qwen'), ())
    """
    return _split(text)[1]


def aliases_of(refs: str | None, method: str) -> list[str]:
    """The aliases of a comma-separated list, the base first; without one those a method names.

    >>> aliases_of("llama, qwen", "mrpo"), aliases_of(None, "dpo:qwen")
    (['llama', 'qwen'], ['qwen'])
    """
    aliases = [alias.strip() for alias in (refs or "").split(",") if alias.strip()]
    aliases = aliases or list(named_references(method))
    if not aliases:
        raise UserError(
            f"no references: give --refs, or name them in --method {method}:alias/alias"
        )
    if len(set(aliases)) < len(aliases):
        raise UserError(f"--refs {refs}: a reference is given twice; name each once")
    return aliases


def beta_warning(normalize: str, beta: float) -> str | None:
    """What to tell a user whose beta was meant for summed log-probs.

    >>> beta_warning("none", 0.1), beta_warning("byte", 2.5)
    (None, None)
    >>> print(beta_warning("token", 0.1)[:42])
    --beta 0.1 is small for --normalize token:
    """
    if normalize == "none" or beta >= 1:
        return None
    return (
        f"--beta {beta:g} is small for --normalize {normalize}: margins per {normalize} are far "
        "smaller than summed ones; try 2.5 (InfiFPO uses 2.5 with, 0.1 without)"
    )


def epsilon_warning(epsilon: float | str | None) -> str | None:
    """What to tell a user whose epsilon leaves clipping without an upper bound.

    >>> epsilon_warning(0.1), epsilon_warning("none"), epsilon_warning(None)
    (None, None, None)
    >>> print(epsilon_warning(1.0)[:44])
    --epsilon 1 leaves clipping (CTRO) without a
    """
    if epsilon is None or isinstance(epsilon, str) or epsilon < 1:
        return None
    return (
        f"--epsilon {epsilon:g} leaves clipping (CTRO) without an upper bound wherever a response "
        "gets 1 or more of it: (1 - epsilon) times the base's log-prob is then not below 0; "
        "stay below 1, or say --epsilon none"
    )


def _split(text: str) -> tuple[str, tuple[str, ...], str, bool]:
    """The method's name, the references named, the weighting ("": none), and whether reliable."""
    body, *parts = text.split("+")
    weightings = [part for part in parts if part != "reliable"]
    name, colon, names = body.partition(":")
    if name not in METHODS and name not in AVERAGES:
        raise UserError(f"method {text!r}: {name!r} is unknown; choose one of {', '.join(METHODS)}")
    references = tuple(names.split("/")) if colon else ()
    if "" in references or "" in parts:
        raise UserError(f"method {text!r} is incomplete; the form is {FORM}")
    if len(weightings) > 1 or len(parts) > len(weightings) + 1:
        raise UserError(
            f"method {text!r} has more than one weighting, or +reliable twice; the form is {FORM}"
        )
    return name, references, "".join(weightings), "reliable" in parts


def _check_references(
    text: str, name: str, references: tuple[str, ...], aliases: Sequence[str], reliable: bool
) -> None:
    unknown = [reference for reference in references if reference not in aliases]
    if unknown:
        raise UserError(
            f"method {text!r}: reference {unknown[0]!r} is not among {', '.join(aliases)}; "
            "add it to --refs"
        )
    if len(set(references)) < len(references):
        raise UserError(f"method {text!r} names a reference twice; name each once")
    if not references:
        raise UserError(f"method {text!r} has no reference; give at least one with --refs")
    if name == "dpo" and len(references) > 1 and not reliable:
        raise UserError(
            f"method {text!r}: dpo takes one reference; use mrpo or multi-dpo for more, or "
            "+reliable, under which the further ones judge the labels"
        )


def _fixed(text: str, method: Method, weights: str) -> tuple[float, ...]:
    """The user's weights, checked against the weighting and the references."""
    if method.weighting != "fixed":
        raise UserError(
            f"--weights does not go with weighting {method.weighting}; leave one of them out"
        )
    try:
        numbers = [float(number) for number in weights.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {weights}: not numbers; give one for each reference, as 0.5,0.3,0.2"
        ) from None
    if len(numbers) != len(method.references):
        raise UserError(
            f"method {text!r} has {len(method.references)} references "
            f"({', '.join(method.references)}) and --weights {len(numbers)} numbers; "
            "give one for each"
        )
    return tuple(fixed_weights(numbers).tolist())
