"""The head alone: time and memory of token log-probs, forward and backward, five ways.

    python benchmarks/head.py [--rows 1536 --width 256 --vocabulary 16384 --dtype float32]

`kept` and `recomputed` are the project's own, with the logits' gradients kept from forward to
backward and with none kept. Each way runs in a process of its own, so that its peak memory is its
own; times are medians, and the ways take turns. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from mrpo.model.head import LogitRule, chunk_rows, token_logps

Way = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    logits = linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat(
        [
            checkpoint(plain, rows, weight, picks, chunk, use_reentrant=False)
            for rows, picks in parts
        ]
    )


def torchs_own(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none")


def kept(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return token_logps(hidden, weight, None, targets, LogitRule(), chunk=chunk, keep_bytes=2**62)


def recomputed(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return token_logps(hidden, weight, None, targets, LogitRule(), chunk=chunk, keep_bytes=0)


WAYS: dict[str, Way] = {
    "plain log_softmax": plain,
    "checkpointed chunks": checkpointed,
    "torch linear_cross_entropy": torchs_own,
    "ours, gradients recomputed": recomputed,
    "ours, gradients kept": kept,
}


def measure(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one forward and backward, and MiB of peak memory above what was there before."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    hidden = torch.randn(options.rows, options.width, device=device, dtype=dtype)
    weight = torch.randn(options.vocabulary, options.width, device=device, dtype=dtype) / 16
    targets = torch.randint(options.vocabulary, (options.rows,), device=device)
    upstream = torch.randn(options.rows, device=device)
    hidden.requires_grad_()
    weight.requires_grad_()
    chunk, cuda = chunk_rows(options.vocabulary, device), device.type == "cuda"
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    (hidden.detach() @ weight.detach()[:64].T).sum()  # allocates the library's own buffers
    before = torch.cuda.memory_allocated() if cuda else _peak()
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        WAYS[name](hidden, weight, targets, chunk).backward(upstream)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    after = torch.cuda.max_memory_allocated() if cuda else _peak()
    return statistics.median(seconds), (after - before) / 2**20


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1536, help="scored tokens")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(options.turns):
        for name in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                results[name].append(process.submit(measure, name, options).result())
    print(
        f"{options.rows} rows, width {options.width}, vocabulary {options.vocabulary}, "
        f"{options.dtype}, {options.device}, {torch.get_num_threads()} threads\n"
    )
    print("| head | seconds | MiB |\n|---|---|---|")
    for name, runs in results.items():
        seconds, peak = (statistics.median(column) for column in zip(*runs))
        print(f"| {name} | {seconds:.3f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
