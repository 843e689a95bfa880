"""Log-probs as arrays: numpy at the edge, units of length, and references that are missing.

The other files of this folder compute on torch tensors. `accepts_numpy` makes their functions take
numpy arrays too. References are computed in float64 whatever comes in, and stay so until they meet
the policy: in float32 a log-prob of −10,000 is a multiple of 0.001. A reference that could not
score a pair is NaN there and gets the weight 0; what is undefined is NaN, never 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

Array: TypeAlias = Any
"""A torch tensor or a numpy array."""

Function = TypeVar("Function", bound=Callable[..., Any])

NORMALIZATIONS = ("none", "token", "byte")


def accepts_numpy(function: Function) -> Function:
    """Make a function of tensors one of numpy arrays as well.

    Arrays are converted to tensors, sharing memory where they can. If no argument is a tensor, the
    result comes back as numpy.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if not any(isinstance(value, np.ndarray) for value in given):
            return function(*args, **kwargs)
        result = function(
            *map(_to_tensor, args), **{name: _to_tensor(value) for name, value in kwargs.items()}
        )
        if any(isinstance(value, Tensor) for value in given):
            return result
        return tuple(map(_to_numpy, result)) if isinstance(result, tuple) else _to_numpy(result)

    return cast(Function, call)


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device that has no float64 (Apple's MPS)."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def floating(tensor: Tensor) -> Tensor:
    """The tensor itself if it holds floating-point numbers, else in float64."""
    return tensor if tensor.is_floating_point() else in_float64(tensor)


def like(values: Any, tensor: Tensor) -> Tensor:
    """`values` (numbers, an array, a tensor) with the dtype and device of `tensor`.

    Gradients pass. A tensor of integers stands for one of float64.
    """
    # First the dtype, then the device, which may not have the dtype of the values.
    return torch.as_tensor(values).to(floating(tensor).dtype).to(tensor.device)


def present_in_both(ref_chosen_logps: Tensor, ref_rejected_logps: Tensor) -> Tensor:
    """[N, K] bool: where a reference has scored both responses of a pair."""
    return ~(ref_chosen_logps.isnan() | ref_rejected_logps.isnan())


def weights_like(weights: Any, logps: Tensor) -> Tensor:
    """Weights [K] or [N, K] as a tensor to go with log-probs [N, K].

    Raises `UserError` where there is not one weight for each reference.
    """
    alpha = like(weights, logps)
    if alpha.ndim == 0 or alpha.shape[-1] != logps.shape[-1]:
        raise UserError(
            f"weights of shape {tuple(alpha.shape)} do not go with log-probs of shape "
            f"{tuple(logps.shape)}; give one weight for each reference, [K] or [N, K]"
        )
    return alpha


def renormalized(weights: Tensor, present: Tensor) -> Tensor:
    """[N, K]: weights over the references present, summing to 1 in each row.

    NaN in a row without any positive weight, and in one with a negative weight.
    """
    weights = torch.where(weights >= 0, weights, torch.nan)
    weights = torch.where(present, weights, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, torch.nan)


@accepts_numpy
def normalize_logps(logps: Array, normalize: str, tokens: Array, response_bytes: Array) -> Array:
    """Summed log-probs per unit of length, so that responses of different lengths compare.

    It comes before weighting, clipping and loss, and is applied to policy and references alike.
    "token" divides by the scoring model's own token count (Wu & Echarghaoui, arXiv 2512.10040; the
    unit differs between tokenizers), "byte" by the response's UTF-8 bytes, the same for all models.

    Args:
        logps: [N] or [N, K] nats, summed over the response.
        normalize: "none", "token" or "byte".
        tokens: tokens scored, the shape of `logps`.
        response_bytes: [N] UTF-8 bytes of the response's contents.

    Returns:
        Nats per response, per token or per byte, in the shape of `logps`; NaN where the length
        is 0.

    >>> logps, tokens = np.array([[-6.0, -8.0]]), np.array([[3, 2]])
    >>> normalize_logps(logps, "token", tokens, np.array([16])).tolist()
    [[-2.0, -4.0]]
    >>> normalize_logps(logps, "byte", tokens, np.array([16])).tolist()
    [[-0.375, -0.5]]
    """
    check_choice("normalization", normalize, NORMALIZATIONS)
    if normalize == "none":
        return logps
    length = like(tokens if normalize == "token" else response_bytes, logps)
    if length.ndim < logps.ndim:
        length = length[..., None]
    return logps / torch.where(length > 0, length, torch.nan)


def check_choice(what: str, given: str, choices: Iterable[str]) -> None:
    """Raise `UserError` for a name that is not among the choices."""
    if given not in choices:
        raise UserError(f"{what} {given!r} is unknown; choose one of {', '.join(choices)}")


def _to_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    # torch has no negative strides, and warns about memory that must not be written.
    return torch.from_numpy(np.require(value, requirements=["C", "W"]))


def _to_numpy(value: Tensor) -> Any:
    return value.numpy()[()]
