"""One body for torch tensors and numpy arrays: the array API standard, through array_api_compat.

The functions of `virtual.py`, `weightings.py` and `losses.py` are written once against
`array_namespace(x)`. Reference arithmetic is float64 whatever comes in, and stays so until it
meets the policy: in float32 a log-prob of −10,000 is a multiple of 0.001.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from array_api_compat import array_namespace, device, is_array_api_obj, to_device

from ..errors import UserError

Array: TypeAlias = Any
"""A torch tensor or a numpy array (or any other array of the standard)."""


def in_float64(array: Array) -> Array:
    """The array in float64, or in float32 on a device that has no float64 (Apple's MPS)."""
    xp = array_namespace(array)
    narrow = getattr(device(array), "type", None) == "mps"
    return xp.astype(array, xp.float32 if narrow else xp.float64, copy=False)


def floating(array: Array) -> Array:
    """The array itself if it holds real floating-point numbers, else as float64."""
    xp = array_namespace(array)
    return array if xp.isdtype(array.dtype, "real floating") else in_float64(array)


def like(values: Any, array: Array) -> Array:
    """`values` (a number, a list, an array) with the namespace, dtype and device of `array`.

    Gradients pass. An array of integers stands for one of float64.
    """
    array = floating(array)
    xp = array_namespace(array)
    if is_array_api_obj(values) and array_namespace(values) is xp:
        return to_device(xp.astype(values, array.dtype, copy=False), device(array))
    return xp.asarray(values, dtype=array.dtype, device=device(array))


def weights_like(weights: Any, logps: Array) -> Array:
    """Weights [K] or [N, K] to go with log-probs [N, K], checked to have one column for each."""
    alpha = like(weights, logps)
    if alpha.ndim == 0 or alpha.shape[-1] != logps.shape[-1]:
        raise UserError(
            f"weights of shape {tuple(alpha.shape)} do not go with log-probs of shape "
            f"{tuple(logps.shape)}; give one weight for each reference, [K] or [N, K]"
        )
    return alpha


def present_in_both(ref_chosen_logps: Array, ref_rejected_logps: Array) -> Array:
    """[N, K] bool: where a reference has scored both responses of a pair."""
    xp = array_namespace(ref_chosen_logps)
    return ~(xp.isnan(ref_chosen_logps) | xp.isnan(ref_rejected_logps))


def normalized(weights: Array, present: Array) -> Array:
    """[N, K]: weights over the references present, summing to 1 in each row.

    A row where nothing is left to divide by, and a negative weight, have no meaning: NaN.
    """
    xp = array_namespace(weights)
    nan = like(float("nan"), weights)
    kept = xp.where(present, xp.where(weights >= 0, weights, nan), like(0.0, weights))
    total = xp.sum(kept, axis=-1, keepdims=True)
    return kept / xp.where(total > 0, total, nan)
