"""A check of one GPU path: what it is called, and how it says pass, FAIL or not here."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .world import World

GPU = torch.cuda.is_available()


class NotHereError(Exception):
    """The machine lacks what a check needs; the text says what."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    run: Callable[[World], str]  # the figures; raises AssertionError with them where they are bad

    def outcome(self, world: World) -> tuple[str, str]:
        """pass, FAIL or not here, and what there is to say."""
        try:
            return "pass", self.run(world)
        except NotHereError as reason:
            return "not here", str(reason)
        except AssertionError as figures:
            return "FAIL", str(figures) or traceback.format_exc(limit=-1).replace("\n", " ")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


CHECKS: list[Check] = []  # in the order in which the modules are imported


def check(name: str) -> Callable[[Callable[[World], str]], Callable[[World], str]]:
    """Make a function a check of this name."""

    def register(run: Callable[[World], str]) -> Callable[[World], str]:
        CHECKS.append(Check(name, run))
        return run

    return register


def need_gpu() -> None:
    if not GPU:
        raise NotHereError("needs a GPU")


def limit_memory(limit: int) -> None:
    """Let torch take so many bytes of the GPU and no more, until `free_memory`."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)


def free_memory() -> None:
    """Leave the next check all of the memory."""
    gc.collect()
    if GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
