"""Settings of `mrpo export`: its flags, YAML keys and defaults. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Write a data set with the virtual reference's log-probs, for other trainers.

    Each usable pair gets `ref_chosen_logps` and `ref_rejected_logps`, so that the sigmoid loss of
    TRL's DPOTrainer is the loss of the method. docs/trl.md has the few lines that make TRL take
    them. beta and the loss type are the trainer's own.

    Example: `mrpo export --pairs pairs --refs llama,qwen --method mrpo --out exports/mrpo`
    """

    pairs: Annotated[str, "Folder of pairs as `mrpo prepare` writes it."]
    out: Annotated[str, "Folder to write; an earlier export there is replaced."]
    format: Annotated[Literal["trl"], "The trainer that is to read it."] = "trl"
    refs: Annotated[
        str | None, "Aliases in order, the base first. By default those that --method names."
    ] = None
    refs_config: Annotated[str, "The file that says what an alias is."] = "configs/refs.yaml"
    store: Annotated[str | None, "The score store. By default $MRPO_STORE, else `store`."] = None
    method: Annotated[str, "METHOD[:ref/ref...][+weighting], as in `mrpo train`."] = "mrpo"
    reference_kind: Annotated[
        Literal["harmonic", "geometric", "arithmetic"] | None,
        "How several references become one. By default the method's.",
    ] = None
    weighting: Annotated[str | None, "Weights of the references. By default the method's."] = None
    weights: Annotated[str | None, "Fixed weights, one per reference, as 0.5,0.3,0.2."] = None
    epsilon: Annotated[
        float | Literal["none"] | None,
        "Clipping (CTRO) around the base, or none. By default the method's, 0.1 for mrpo.",
    ] = None
    adaptive_epsilon: Annotated[
        bool, "Split epsilon between the two responses, as MRPO does; otherwise all for both."
    ] = True
