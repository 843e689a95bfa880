"""A method in one line of text: `METHOD[:ref/ref…][+weighting]`, for `train` and `compare` alike.

`parse_method` reads the text, lets flags override its parts, and returns a frozen `Method`
(`objective.py`), which checks its parts and computes weights, targets and losses. `METHODS` has
the defaults of what the text names, the dataclass `Method` those of everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

from ..errors import UserError
from .objective import SEPARATE, Method
from .weightings import fixed_weights


class MethodDefaults(NamedTuple):
    """The parts that a method's name stands for."""

    kind: str
    weighting: str = "uniform"
    epsilon: float | None = None


METHODS = {
    "mrpo": MethodDefaults("harmonic", "arwc", 0.1),
    "multi-dpo": MethodDefaults(SEPARATE),
    "dpo": MethodDefaults("harmonic"),
    "harmonic": MethodDefaults("harmonic"),
    "geometric": MethodDefaults("geometric"),
    "arithmetic": MethodDefaults("arithmetic"),
}


class MethodOptions(TypedDict, total=False):
    """Fields of `Method` that the text does not name; their defaults are the dataclass's."""

    adaptive_epsilon: bool
    normalize: str
    beta: float
    loss_type: str
    label_smoothing: float
    sft_weight: float


class ReferenceSettings(Protocol):
    """Settings of a command that say how several references become one."""

    method: str
    refs: str | None
    reference_kind: Any  # one of KINDS, or None
    weighting: str | None
    weights: str | None
    epsilon: Any  # a number, "none", or None
    adaptive_epsilon: bool


class MethodSettings(ReferenceSettings, Protocol):
    """Settings of a command that has a loss on top of the references."""

    normalize: Any  # one of NORMALIZATIONS
    beta: float
    loss_type: str
    label_smoothing: float
    sft_weight: float


def parse_method(
    text: str,
    aliases: Sequence[str],
    *,
    reference_kind: str | None = None,
    weighting: str | None = None,
    weights: str | Sequence[float] | None = None,
    epsilon: float | str | None = None,
    **options: Unpack[MethodOptions],
) -> Method:
    """Read `METHOD[:ref/ref…][+weighting]`; every keyword that is not None overrides its part.

    Args:
        text: for example "mrpo", "mrpo:llama/qwen+fitted", "dpo:qwen", "multi-dpo+vaw".
        aliases: the run's references, in the order of the scores' columns; the first is the base.
            Without a list in the text a method uses all of them, and dpo the first.
        reference_kind: "harmonic", "geometric" or "arithmetic".
        weighting: one of `WEIGHTINGS`.
        weights: one number for each reference of the method, or "0.5,0.3,0.2"; implies the
            weighting "fixed".
        epsilon: CTRO's half-width, or "none".
        options: other fields of `Method`.

    Raises `UserError` for whatever is unknown or does not go together.

    >>> method = parse_method("mrpo:llama/qwen", ["mistral", "llama", "qwen"])
    >>> str(method), method.columns, method.kind, method.epsilon
    ('mrpo:llama/qwen+arwc', (1, 2), 'harmonic', 0.1)
    >>> str(parse_method("dpo", ["llama", "qwen"]))
    'dpo:llama'
    """
    name, named, text_weighting = _split(text)
    default = METHODS[name]
    references = named or tuple(aliases[:1] if name == "dpo" else aliases)
    _check_references(text, name, references, aliases)
    if reference_kind is not None and name == "multi-dpo":
        raise UserError(
            f"method {text!r} averages losses and has no reference kind; "
            f"leave out --reference-kind {reference_kind}, or use the method {reference_kind}"
        )
    numbers = _numbers(weights)
    method = Method(
        name=name,
        references=references,
        columns=tuple(list(aliases).index(reference) for reference in references),
        kind=reference_kind or default.kind,
        weighting=weighting or text_weighting or ("fixed" if numbers else default.weighting),
        epsilon=default.epsilon if epsilon is None else _epsilon(epsilon),
        **options,
    )
    return replace(method, weights=_fixed(text, method, numbers))


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


def method_of(settings: MethodSettings) -> Method:
    """The method that a command's settings name, over exactly the references that it uses."""
    return replace(
        reference_method(settings),
        normalize=settings.normalize,
        beta=settings.beta,
        loss_type=settings.loss_type,
        label_smoothing=settings.label_smoothing,
        sft_weight=settings.sft_weight,
    )


def reference_method(settings: ReferenceSettings) -> Method:
    """`method_of` for a command without a loss of its own.

    The columns are those of the references used, in the method's order.
    """
    method = parse_method(
        settings.method,
        aliases_of(settings.refs, settings.method),
        reference_kind=settings.reference_kind,
        weighting=settings.weighting,
        weights=settings.weights,
        epsilon=settings.epsilon,
        adaptive_epsilon=settings.adaptive_epsilon,
    )
    return replace(method, columns=tuple(range(len(method.references))))


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


def _split(text: str) -> tuple[str, tuple[str, ...], str]:
    """The method's name, the references named and the weighting, "" where there is none."""
    body, plus, weighting = text.partition("+")
    name, colon, names = body.partition(":")
    if name not in METHODS:
        raise UserError(f"method {text!r}: {name!r} is unknown; choose one of {', '.join(METHODS)}")
    references = tuple(names.split("/")) if colon else ()
    if "" in references or (plus and not weighting):
        raise UserError(f"method {text!r} is incomplete; the form is METHOD[:ref/ref…][+weighting]")
    return name, references, weighting


def _check_references(
    text: str, name: str, references: tuple[str, ...], aliases: Sequence[str]
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
    if name == "dpo" and len(references) > 1:
        raise UserError(f"method {text!r}: dpo takes one reference; use mrpo or multi-dpo for more")


def _epsilon(epsilon: float | str) -> float | None:
    """A number of 0 or more, or None for "none"."""
    if epsilon == "none":
        return None
    try:
        number = float(epsilon)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise UserError(f"epsilon is {epsilon!r}; it must be a number of 0 or more, or none")
    return number


def _numbers(weights: str | Sequence[float] | None) -> list[float] | None:
    """Weights as given by a caller or on the command line."""
    if weights is None:
        return None
    try:
        return [float(w) for w in (weights.split(",") if isinstance(weights, str) else weights)]
    except ValueError:
        raise UserError(
            f"--weights {weights}: not numbers; give one for each reference, as 0.5,0.3,0.2"
        ) from None


def _fixed(text: str, method: Method, weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """The user's weights, checked against the weighting and the references."""
    if (method.weighting == "fixed") != (weights is not None):
        raise UserError(
            "weighting fixed needs --weights, for example --weights 0.5,0.3,0.2"
            if weights is None
            else f"--weights does not go with weighting {method.weighting}; leave one of them out"
        )
    if weights is None:
        return None
    if len(weights) != len(method.references):
        raise UserError(
            f"method {text!r} has {len(method.references)} references "
            f"({', '.join(method.references)}) and --weights {len(weights)} numbers; "
            "give one for each"
        )
    return tuple(fixed_weights(weights).tolist())
