"""Settings of `mrpo audit`: flags, YAML keys and defaults. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import UserError


@dataclass(kw_only=True, slots=True)
class AuditConfig:
    """List the pairs that most deserve a human look, from the references' scores.

    Pairs whose label the references find unlikely, pairs that divide the references, pairs whose
    label length alone explains, near duplicates with opposite labels. Fill in the table's column
    `decision` with keep, exclude or flip; `mrpo prepare --exclude audit.csv --flip audit.csv`
    reads it back.

    Example: `mrpo audit --pairs pairs --refs llama,mistral,qwen --out audit.csv`
    """

    refs: Annotated[str, "aliases of scored references, comma-separated"]
    pairs: Annotated[str, "folder of pairs as `mrpo prepare` writes it"] = "pairs"
    refs_config: Annotated[str, "the file that says what an alias is"] = "configs/refs.yaml"
    store: Annotated[
        str | None, "the score store, a folder or URL; by default $MRPO_STORE, else `store`"
    ] = None
    out: Annotated[str, "the table to write; figures by source go beside it as .json"] = "audit.csv"
    top: Annotated[int, "pairs to list for each reason"] = 100

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"--top is {self.top}; it must be above 0")
        if not self.out.endswith(".csv"):
            raise UserError(f"--out is {self.out}; the table is CSV, name it like audit.csv")
