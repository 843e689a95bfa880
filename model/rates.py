"""How fast a device multiplies matrices, in one precision and in another.

Many processors have no instructions for 16 bits: a product in bfloat16 then takes many times as
long as one in float32, although half as much memory moves.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch.nn.functional import linear

SIZES = {"cuda": 8192, "cpu": 512}  # of the square matrices
SLOWER = 2.0  # times: from here on it is worth a warning


@cache
def matrix_rate(device: str, dtype: str) -> float:
    """Floating-point operations per second of a matrix product: the best of five.

    As a linear layer computes it: torch's plain product has another, far slower path for 16 bits.
    """
    size = SIZES[device]
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        linear(matrix, matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
        if best > 0.1:
            break
    return 2 * size**3 / best


def slow_precision(dtype: str) -> str | None:
    """What to say of computing in `dtype` on this machine's CPU; None where it is fast enough."""
    if dtype not in ("bfloat16", "float16"):
        return None
    times = matrix_rate("cpu", "float32") / matrix_rate("cpu", dtype)
    if times < SLOWER:
        return None
    return f"{dtype} is {times:,.0f} times slower than float32 on this processor"
