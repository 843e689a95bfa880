"""Settings of `mrpo demo`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """Run the whole method here and now: no GPU, no download, a few minutes on two cores.

    Makes preference pairs in three domains, trains three tiny references of Llama, Mistral and
    Qwen architecture, each strong in one domain, and then runs the commands that anyone would:
    prepare, precompute, train DPO with each reference and MRPO with all. Ends with the accuracy
    of all of them on held-out pairs. Run again, it goes on where it was stopped.

    Example: `mrpo demo --out demo-run`
    """

    out: Annotated[str, "the folder for everything that is made"] = "demo-run"
    pairs: Annotated[int, "preference pairs, a third from each domain"] = 3000
    seed: Annotated[int, "of the data, the references and the training"] = 0
    quick: Annotated[
        bool, "few pairs and short training: shows that all parts run, and nothing else"
    ] = False
