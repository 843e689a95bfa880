"""Settings of `mrpo refs`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(kw_only=True, slots=True)
class RefsConfig:
    """List the references of refs.yaml: size, context, license, and what of the data is scored.

    No weights are loaded. What the Hub alone knows is shown as "?" where it can't be reached.

    Example: `mrpo refs --pairs pairs`
    """

    refs: Annotated[str | None, "aliases to list, comma-separated; by default all"] = None
    refs_config: Annotated[str, "the file that says what an alias is"] = "configs/refs.yaml"
    pairs: Annotated[str | None, "folder of pairs; by default `pairs` where there is one"] = None
    store: Annotated[
        str | None, "the score store, a folder or URL; by default $MRPO_STORE, else `store`"
    ] = None
