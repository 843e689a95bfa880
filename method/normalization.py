"""Log-probs per token or per byte, so that references of different lengths compare.

Comes before everything else: weightings, clipping and losses see normalized numbers, policy and
references alike. `token` divides by the scoring model's own token count (Wu & Echarghaoui, arXiv
2512.10040; the unit then differs between tokenizers), `byte` by the UTF-8 bytes of the response's
contents, one unit for all models.
"""

from __future__ import annotations

from array_api_compat import array_namespace

from ..errors import UserError
from .arrays import Array, like

NORMALIZATIONS = ("none", "token", "byte")


def normalize_logps(logps: Array, normalize: str, tokens: Array, response_bytes: Array) -> Array:
    """Summed log-probs per unit of length.

    Args:
        logps: [N] or [N, K] nats, summed over the response.
        normalize: "none", "token" or "byte".
        tokens: tokens scored, the shape of `logps`.
        response_bytes: [N] UTF-8 bytes of the response's contents.

    Returns:
        Nats per response, per token or per byte, in the shape of `logps`.

    >>> import numpy as np
    >>> logps, tokens = np.array([[-6.0, -8.0]]), np.array([[3, 2]])
    >>> normalize_logps(logps, "token", tokens, np.array([16])).tolist()
    [[-2.0, -4.0]]
    >>> normalize_logps(logps, "byte", tokens, np.array([16])).tolist()
    [[-0.375, -0.5]]
    """
    check_normalize(normalize)
    if normalize == "none":
        return logps
    xp = array_namespace(logps)
    units = like(tokens if normalize == "token" else response_bytes, logps)
    if units.ndim < logps.ndim:
        units = units[..., None]
    # Where a reference is missing its token count may be anything; its log-prob stays NaN.
    return logps / xp.where(units > 0, units, like(float("nan"), logps))


def check_normalize(normalize: str) -> None:
    """Refuse an unknown unit."""
    if normalize not in NORMALIZATIONS:
        raise UserError(
            f"normalization {normalize!r} is unknown; choose one of {', '.join(NORMALIZATIONS)}"
        )


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
