"""Settings of `prepare` and `inspect`: flags, YAML keys and defaults. Standard library only.

Settings of `mrpo store …`: flags, YAML keys and defaults. Standard library only."""

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


STORE = "The score store: a folder, s3://… or gs://…. By default $MRPO_STORE, else `store`."
REFS = "Aliases (or alias@prefix), comma-separated. By default all of the store."


@dataclass(kw_only=True, slots=True)
class StatusConfig:
    """What the store holds: references by rows, bytes, identity, date and engine.

    With --pairs also how many of these pairs each reference has not scored yet.

    Example: `mrpo store status --store store --pairs pairs`
    """

    store: Annotated[str | None, STORE] = None
    pairs: Annotated[str | None, "Count what of this folder of pairs is missing for which."] = None
    policies: Annotated[bool, "Show the trained policies that were scored instead."] = False


@dataclass(kw_only=True, slots=True)
class VerifyConfig:
    """Check every file of the store against its digest; changes nothing.

    Exit code 1 where anything is damaged: the next `mrpo precompute` sets the file aside and
    scores its rows again. With --rescore a sample is scored again too, and compared.

    Example: `mrpo store verify --store store --rescore 100 --refs-config configs/refs.yaml`
    """

    store: Annotated[str | None, STORE] = None
    refs: Annotated[str | None, REFS] = None
    rescore: Annotated[int, "Pairs to score again for each reference and compare; 0: none."] = 0
    refs_config: Annotated[str, "What an alias is, for --rescore."] = "configs/refs.yaml"
    pairs: Annotated[
        str | None, "Pairs to take the sample from. By default those that were scored last."
    ] = None


@dataclass(kw_only=True, slots=True)
class GcConfig:
    """List what the store needs no longer, and with --delete remove it.

    That is: files of writers that died, files set aside as damaged, files whose rows all stand in
    others, and references that a later commit or changed weights replaced under every alias they
    had, unless a run under --runs names them.

    Example: `mrpo store gc --store store --runs runs --delete`
    """

    store: Annotated[str | None, STORE] = None
    runs: Annotated[
        str, "Comma-separated folders whose files name the references that are kept."
    ] = "runs"
    delete: Annotated[bool, "Remove what is listed. Without it nothing is."] = False


@dataclass(kw_only=True, slots=True)
class PushConfig:
    """Copy references and scores to another store; what is there already is not sent again.

    To hf://datasets/org/name all files go in as few commits as possible.

    Example: `mrpo store push s3://team/store --store store --refs llama,qwen`
    """

    target: Annotated[str, Arg("The other store: a folder, s3://…, gs://… or hf://datasets/…")]
    store: Annotated[str | None, STORE] = None
    refs: Annotated[str | None, REFS] = None


@dataclass(kw_only=True, slots=True)
class PullConfig:
    """Copy references and scores from another store; damaged files are left behind.

    Example: `mrpo store pull hf://datasets/org/scores --store store`
    """

    source: Annotated[str, Arg("The other store: a folder, s3://…, gs://… or hf://datasets/…")]
    store: Annotated[str | None, STORE] = None
    refs: Annotated[
        str | None, "Aliases (or alias@prefix), comma-separated. By default all of the other store."
    ] = None


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """Bring in scores that others computed: TRL's columns, a CSV, a reference behind an API.

    Rows are pairs in any format that `mrpo prepare` reads, with the log-prob of either response
    beside them (natural log, summed over the response). They are marked as imported: nothing here
    can say what made them. A pair that the reference has already keeps its score.

    Example: `mrpo store import scores.csv --alias judge --model "judge-v2 by its API"`
    """

    source: Annotated[str, Arg("Files or org/name:split, as for `mrpo prepare`.")]
    alias: Annotated[str, "The name that --refs will use."]
    model: Annotated[str, "What computed the scores: another text is another reference."]
    store: Annotated[str | None, STORE] = None
    prompt_column: Annotated[
        str | None, "Column of the prompt; by default `prompt` where the data has it."
    ] = None
    chosen_column: Annotated[str, "Column of the chosen response."] = "chosen"
    rejected_column: Annotated[str, "Column of the rejected response."] = "rejected"
    chosen_logps_column: Annotated[str, "Column of its log-prob, nats."] = "ref_chosen_logps"
    rejected_logps_column: Annotated[str, "Column of its log-prob, nats."] = "ref_rejected_logps"
    chosen_tokens_column: Annotated[str, "Column of its tokens, where known."] = "ref_chosen_tokens"
    rejected_tokens_column: Annotated[str, "Column of its tokens, where known."] = (
        "ref_rejected_tokens"
    )
    by_id: Annotated[bool, "Rows have a `pair_id` (hex) in place of prompt and responses."] = False
    chat: Annotated[bool, "Wrap text pairs as messages, as `mrpo prepare --chat` does."] = False
