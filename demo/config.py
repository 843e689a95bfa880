"""Settings of `mrpo demo`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..settings import above_zero, seed


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """Run the whole method on this machine: no GPU, no download, a few minutes on two cores.

    Makes preference pairs in three domains, trains three tiny references of Llama, Mistral and
    Qwen architecture, each sound in one domain and ignorant of the others, and then takes the
    steps that anyone would: prepare, precompute, compare, report. Ends with the accuracy of DPO
    with each reference and of two methods with all of them, on few pairs with more and more of
    their labels wrong. Run again, it continues where it was stopped.

    Example: `mrpo demo --out demo-run`
    """

    out: Annotated[str, "Folder for everything that is made."] = "demo-run"
    pairs: Annotated[int, "Preference pairs, a third from each domain."] = 3000
    seed: Annotated[int, "Seed of the data, the references and the training."] = 0
    quick: Annotated[
        bool, "Few pairs and short training: shows that all parts run, and nothing else."
    ] = False

    def __post_init__(self) -> None:
        above_zero(self, "pairs")
        seed(self, "seed")
