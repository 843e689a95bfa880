"""The processes of a run: one, or as many as torchrun started.

Everything here works for a single process too, so that the loop has no second path. Collectives of
small numbers go over gloo on the CPU; FSDP2's own go over NCCL where there are GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run: its rank, their number, its device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None) -> Ranks:
        """Join the processes that torchrun started, if it started any."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {kind}: torch finds no GPU here; use --device cpu")
        if kind not in ("cpu", "cuda") and not kind.startswith("cuda:"):
            raise UserError(f"--device {kind}: must be cpu or cuda")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(0, 1, torch.device(kind))
        if kind == "cuda":
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(kind)
        dist.init_process_group("cpu:gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl")
        return cls(dist.get_rank(), world, torch.device(kind))

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print, on the first process only."""
        if self.first:
            print(line, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, as float64 on the CPU."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The maximum over all processes, as float64 on the CPU."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; the same answer on all of them."""
        return flag if self.world == 1 else bool(self.max(torch.tensor(float(flag))))

    def barrier(self) -> None:
        if self.world > 1:
            self.sum(torch.zeros(()))

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Do the work on the first process and return its result on all.

        A `UserError` is raised on all of them, so that none is left waiting.
        """
        if self.world == 1:
            return work()
        box: list[tuple[Result | None, str | None]] = [(None, None)]
        if self.first:
            try:
                box = [(work(), None)]
            except UserError as error:
                box = [(None, str(error))]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        result, message = box[0]
        if message is not None:
            raise UserError(message)
        return result  # type: ignore[return-value]

    def gather(self, value: Result) -> list[Result]:
        """The value of every process, in the order of their ranks; any that can be pickled."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        values = values.detach().to("cpu", torch.float64)
        if self.world > 1:
            dist.all_reduce(values, operation)
        return values


ALONE = Ranks(0, 1, torch.device("cpu"))
