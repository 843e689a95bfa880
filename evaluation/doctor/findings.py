"""What doctor found wrong with a reference: evidence, likely cause, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["fault", "suspect", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation. A fault makes the scores wrong, a suspect may, a note does not."""

    level: Level
    code: str  # "swapped", "truncated", …: the same for the same fault, however it was found
    evidence: str
    cause: str
    shown_by: Literal["scores", "probe", "settings"] = "scores"
