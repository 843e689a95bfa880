"""Settings of `mrpo doctor` and `mrpo evaluate`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import UserError

PAIRS = "folder of pairs as `mrpo prepare` writes it"
REFS_CONFIG = "the file that says what an alias is"
STORE = "the score store, a folder or URL; by default $MRPO_STORE, else `store`"


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """Say of every reference whether its scores can be trusted, and what it is worth.

    Works from the stored scores: accuracy, likelihood, length, agreement with the others, and the
    traces that known faults leave. With --probe a few pairs are scored again in an independent
    way, where the weights are at hand; that shows what scores alone can't. Exit code 1 where a
    reference is broken.

    Example: `mrpo doctor --refs llama,mistral,qwen --probe 16`
    """

    refs: Annotated[str, "aliases of scored references, comma-separated; the first is the base"]
    pairs: Annotated[str, PAIRS] = "pairs"
    refs_config: Annotated[str, REFS_CONFIG] = "configs/refs.yaml"
    store: Annotated[str | None, STORE] = None
    probe: Annotated[int, "pairs to score again for each reference; 0: none"] = 0
    sample: Annotated[int, "pairs to look at, drawn at random where there are more"] = 20_000
    beta: Annotated[float, "DPO's and MRPO's beta, for the first loss"] = 0.1
    epsilon: Annotated[float, "half-width of MRPO's clipping (CTRO), for the saturation"] = 0.1
    out: Annotated[str, "the file to write; the settings go beside it"] = "doctor.json"

    def __post_init__(self) -> None:
        if self.probe < 0:
            raise UserError(f"--probe is {self.probe}; it must be 0 or more")
        if self.sample < 1:
            raise UserError(f"--sample is {self.sample}; it must be above 0")
        if not self.beta > 0:
            raise UserError(f"--beta is {self.beta}; it must be above 0")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Measure policies on held-out pairs: all on one scale, whatever method trained them.

    Accuracy by likelihood (summed, per token, per byte) and by implicit reward, that is by how
    much more than the base reference a policy prefers the chosen response; margins; by source;
    with intervals that draw whole prompts. A policy is scored as a reference is, by the same
    engines, and its scores are kept in the store: evaluating it again costs nothing.

    Example: `mrpo evaluate --runs runs/dpo,runs/mrpo --base llama`
    """

    policies: Annotated[
        str | None, "model folders, PEFT adapter folders or Hub ids, comma-separated"
    ] = None
    runs: Annotated[
        str | None, "folders of finished runs, comma-separated; pairs and base are taken from them"
    ] = None
    base: Annotated[
        str | None, "the scored reference that rewards are measured from; by default the runs' base"
    ] = None
    pairs: Annotated[str | None, f"{PAIRS}; by default the runs', else `pairs`"] = None
    refs_config: Annotated[str | None, f"{REFS_CONFIG}; by default the runs'"] = None
    store: Annotated[str | None, f"{STORE}; by default the runs'"] = None
    split: Annotated[
        Literal["validation", "train", "all"], "pairs to evaluate on; validation: the held-out ones"
    ] = "validation"
    engine: Annotated[
        Literal["hf", "vllm", "auto"], "what scores the policies, as in `mrpo precompute`"
    ] = "hf"
    max_tokens: Annotated[int | None, "tokens computed at once; by default chosen by device"] = None
    out: Annotated[str, "the file to write; the settings go beside it"] = "evaluate.json"

    def __post_init__(self) -> None:
        if not (self.policies or self.runs):
            raise UserError("nothing to evaluate; name models with --policies or runs with --runs")
