"""Settings of `prepare` and `inspect`: flags, YAML keys and defaults. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..settings import Arg


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Turn preference data into shards of pairs.

    Reads TRL's preference formats (text or messages, with or without a prompt column) and
    HH-RLHF dialogues. Rows that cannot be used are dropped, counted by reason and listed in
    dropped.jsonl; broken structure stops with file, row and field.

    Example: `mrpo prepare trl-lib/ultrafeedback_binarized:train --out pairs`
    """

    source: Annotated[
        str,
        Arg(
            "comma-separated files (.jsonl, .csv, both also .gz, .parquet) and Hub data sets "
            "as org/name:split or org/name/config:split"
        ),
    ]
    out: Annotated[str, "the folder to write; one that holds pairs is replaced"]
    prompt_column: Annotated[
        str | None, "column of the prompt; by default `prompt` where the data has it"
    ] = None
    chosen_column: Annotated[str, "column of the chosen response"] = "chosen"
    rejected_column: Annotated[str, "column of the rejected response"] = "rejected"
    source_column: Annotated[
        str | None,
        "column that names where a pair comes from; by default `source` where the data has it, "
        "else the name of the file or data set",
    ] = None
    chat: Annotated[bool, "wrap text pairs as one user and one assistant message"] = False
    validation_fraction: Annotated[
        float, "share of prompts to hold out, chosen by a digest of the prompt"
    ] = 0.0
    exclude: Annotated[
        str | None,
        "reviewed tables of `mrpo audit`, comma-separated: leave out the pairs whose decision is "
        "exclude, or all where there is no such column",
    ] = None
    flip: Annotated[
        str | None, "likewise: swap chosen and rejected of the pairs whose decision is flip"
    ] = None
    strict: Annotated[bool, "stop at the first row that cannot be used"] = False
    allow_dropped: Annotated[bool, "go on when more than 5 % of the rows cannot be used"] = False
    shard_pairs: Annotated[int, "pairs in a shard"] = 8192


@dataclass(kw_only=True, slots=True)
class InspectConfig:
    """Show a pair as a reference sees it: its template's text, and which of it is scored.

    The scored span and the end of turn are colored, or between brackets where there is no
    color. No weights are loaded.

    Example: `mrpo inspect --ref llama --row 7 --tokens`
    """

    ref: Annotated[str, "alias of the reference, or several as a,b,c"]
    row: Annotated[int, "row of the pair in the data set, from 0"] = 0
    pairs: Annotated[str, "folder of pairs as `mrpo prepare` writes it"] = "pairs"
    refs_config: Annotated[str, "the file that says what an alias is"] = "configs/refs.yaml"
    tokens: Annotated[bool, "list the tokens too: id, piece and part"] = False
    color: Annotated[
        Literal["auto", "always", "never"], "auto: on a terminal, unless NO_COLOR is set"
    ] = "auto"
