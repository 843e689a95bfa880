"""Settings of `mrpo report`: flags, YAML keys and defaults. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import UserError
from ..settings import Arg


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Write one HTML page on references, runs and comparisons: plots, tables, what follows.

    The page holds everything it shows and asks for nothing from outside; the same figures go
    beside it as JSON. Without folders the page is about the references alone.

    Example: `mrpo report runs/compare,runs/mrpo --out report.html`
    """

    folders: Annotated[
        str | None, Arg("comma-separated folders of `mrpo train` and `mrpo compare`")
    ] = None
    refs: Annotated[
        str | None, "aliases of scored references, the base first; by default the folders'"
    ] = None
    pairs: Annotated[
        str | None, "folder of pairs as `mrpo prepare` writes it; by default the folders'"
    ] = None
    refs_config: Annotated[
        str | None, "the file that says what an alias is; by default the folders'"
    ] = None
    store: Annotated[str | None, "the score store; by default the folders'"] = None
    audit: Annotated[str | None, "a table that `mrpo audit` wrote, to show its figures"] = None
    out: Annotated[
        str | None, "the page to write; by default report.html in the first folder, else here"
    ] = None

    def __post_init__(self) -> None:
        if not self.folders and not self.refs:
            raise UserError("nothing to report on; name folders of runs, or references with --refs")
        if self.out is not None and not self.out.endswith(".html"):
            raise UserError(f"--out is {self.out}; the page is HTML, name it like report.html")
