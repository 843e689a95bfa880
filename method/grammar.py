"""A method in one line of text: `METHOD[:ref/ref…][+weighting]`, for `train` and `compare` alike.

`parse_method` reads the text, lets flags override its parts, refuses what makes no sense and
gives a frozen `Method` (`objective.py`), which computes the weights, targets and losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..train.config import ExportConfig, TrainConfig
from .losses import check_loss
from .normalization import check_normalize
from .objective import SEPARATE, Method
from .virtual_reference import KINDS
from .weightings import WEIGHTINGS, fixed_weights

__all__ = [
    "METHODS",
    "Method",
    "aliases_of",
    "method_of",
    "named_references",
    "parse_method",
]

METHODS: dict[str, dict[str, Any]] = {
    "mrpo": {"kind": "harmonic", "weighting": "arwc", "epsilon": 0.1},
    "multi-dpo": {"kind": SEPARATE, "weighting": "uniform", "epsilon": None},
    "dpo": {"kind": "harmonic", "weighting": "uniform", "epsilon": None},
    "harmonic": {"kind": "harmonic", "weighting": "uniform", "epsilon": None},
    "geometric": {"kind": "geometric", "weighting": "uniform", "epsilon": None},
    "arithmetic": {"kind": "arithmetic", "weighting": "uniform", "epsilon": None},
}


def parse_method(
    text: str,
    aliases: Sequence[str],
    *,
    reference_kind: str | None = None,
    weighting: str | None = None,
    weights: str | Sequence[float] | None = None,
    epsilon: float | str | None = None,
    adaptive_epsilon: bool = True,
    normalize: str = "none",
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
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
    kind = reference_kind or default["kind"]
    if kind not in (*KINDS, SEPARATE):
        raise UserError(f"reference kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    given = _numbers(weights)
    weighting = weighting or text_weighting or ("fixed" if given else default["weighting"])
    check_normalize(normalize)
    _check_numbers(beta, sft_weight)
    check_loss(loss_type, label_smoothing)
    if loss_type == "ipo" and normalize != "token":
        raise UserError("loss type ipo works on log-probs per token; add --normalize token")
    return Method(
        name=name,
        references=references,
        columns=tuple(list(aliases).index(reference) for reference in references),
        kind=kind,
        weighting=weighting,
        epsilon=_epsilon(default["epsilon"] if epsilon is None else epsilon),
        adaptive_epsilon=adaptive_epsilon,
        normalize=normalize,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        sft_weight=sft_weight,
        weights=_fixed(text, weighting, given, references),
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
        raise UserError(f"--refs {refs}: a reference stands there twice; name each once")
    return aliases


def method_of(config: TrainConfig | ExportConfig) -> Method:
    """The method that the settings name, over exactly the references that it uses.

    They are its columns, in the run's order. Each keyword of `parse_method` that the settings have
    is handed on under its own name.

    >>> method_of(TrainConfig(output_dir="run", refs="a,b,c", method="mrpo:b/c")).columns
    (0, 1)
    """
    names = parse_method.__kwdefaults__ or {}
    settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
    used = parse_method(config.method, aliases_of(config.refs, config.method), **settings)
    return parse_method(config.method, used.references, **settings)


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


def _check_numbers(beta: float, sft_weight: float) -> None:
    if not 0 < beta < float("inf"):
        raise UserError(f"beta is {beta}; it must be a positive number, for example 0.1")
    if not 0 <= sft_weight < float("inf"):
        raise UserError(f"the SFT weight is {sft_weight}; it must be 0 or more")


def _epsilon(epsilon: float | str | None) -> float | None:
    """A number of 0 or more, or None for "none"."""
    if epsilon is None or epsilon == "none":
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


def _fixed(
    text: str, weighting: str, weights: Sequence[float] | None, references: tuple[str, ...]
) -> tuple[float, ...] | None:
    """The user's weights, checked against the weighting and the references."""
    if weighting not in WEIGHTINGS:
        raise UserError(
            f"weighting {weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}"
        )
    if (weighting == "fixed") != (weights is not None):
        raise UserError(
            "weighting fixed needs --weights, for example --weights 0.5,0.3,0.2"
            if weights is None
            else f"--weights does not go with weighting {weighting}; leave one of them out"
        )
    if weights is None:
        return None
    if len(weights) != len(references):
        raise UserError(
            f"method {text!r} has {len(references)} references ({', '.join(references)}) and "
            f"--weights {len(weights)} numbers; give one for each"
        )
    return tuple(fixed_weights(weights).tolist())
