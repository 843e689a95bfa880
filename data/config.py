"""Settings of `mrpo prepare`, `mrpo inspect` and `mrpo store …`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..errors import UserError
from ..settings import (
    Arg,
    PairSettings,
    Several,
    StoreRoot,
    StoreSettings,
    at_least_zero,
    comma_separated,
    no_effect,
    share,
)

MAX_SHARD_PAIRS = 65_536  # a shard is held in memory, and a column of texts must stay below 2 GB
FIELDS = (  # what --map can build
    *("prompt", "system", "chosen", "rejected", "completion", "label", "completions", "scores"),
    *("source", "split", "group"),
)
STORED_REFERENCES = "Aliases (or alias@identity), comma-separated. By default all."


@dataclass(kw_only=True, slots=True)
class ColumnSettings:
    """What the columns of a source are called."""

    prompt_column: Annotated[
        str | None,
        "Column of the prompt. By default `prompt`, else `instruction` with `input` and `history`, "
        "`question`, `query`, `conversations`, `messages` or `input`.",
    ] = None
    chosen_column: Annotated[str, "Column of the chosen response."] = "chosen"
    rejected_column: Annotated[str, "Column of the rejected response."] = "rejected"
    chat: Annotated[bool, "Wrap text pairs as one user and one assistant message."] = False
    map: Annotated[
        Several,
        "A field built from columns, as prompt='{instruction}\\n{input}'; may be given several "
        f"times. Fields: {', '.join(FIELDS)}.",
    ] = ()
    ignore_columns: Annotated[
        str | None, "Columns to leave out, comma-separated, though they look like a prompt's."
    ] = None
    # `prepare` alone has these settings.
    source_column: str | None = field(default=None, init=False)
    group_column: str | None = field(default=None, init=False)
    pairs_from: Literal["best-worst", "all", "adjacent"] | None = field(default=None, init=False)
    score_column: str | None = field(default=None, init=False)
    min_gap: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        fields = set(self.mapped())
        named = {
            "prompt": self.prompt_column is not None,
            "chosen": self.chosen_column != "chosen",
            "rejected": self.rejected_column != "rejected",
            "source": self.source_column is not None,
            "group": self.group_column is not None,
        }
        for name, is_named in named.items():
            if is_named and name in fields:
                raise UserError(f"--{name}-column and --map {name} are both given; keep one")

    def mapped(self) -> dict[str, str]:
        """The template of each field that `map` builds; raises `UserError` for an invalid one."""
        templates: dict[str, str] = {}
        for given in self.map:
            name, equals, template = given.partition("=")
            if not equals or name not in FIELDS:
                raise UserError(
                    f"--map is {given!r}; it must be FIELD=TEMPLATE with a field of "
                    f"{', '.join(FIELDS)}, as in prompt='{{instruction}}\\n{{input}}'"
                )
            if name in templates:
                raise UserError(f"--map {name} is given twice; keep one")
            templates[name] = template
        return templates

    def ignored(self) -> list[str]:
        return comma_separated(self.ignore_columns, "--ignore-columns")


@dataclass(kw_only=True, slots=True)
class PrepareConfig(ColumnSettings):
    """Turn preference data into shards of pairs.

    Reads TRL's preference formats, HH-RLHF's dialogues, Alpaca, ShareGPT, OpenAI's preferences,
    scored or ranked responses (UltraFeedback, Nectar) and labelled ones (KTO); docs/data.md has an
    example of each. Rows that cannot be used are dropped, counted by reason and listed in
    dropped.jsonl; columns that are not used are named; broken structure stops with file, row and
    field.

    Example: `mrpo prepare trl-lib/ultrafeedback_binarized:train --out pairs`
    """

    source: Annotated[
        str,
        Arg(
            "Comma-separated files (.jsonl, .json, .csv, all also .gz and .zst, .parquet), folders "
            "and quoted globs of them, and Hub data sets as org/name:split or "
            "org/name/config:split."
        ),
    ]
    out: Annotated[
        str,
        "Folder to write. Pairs in it are replaced, unless a store or an unfinished run uses them.",
    ]
    source_column: Annotated[
        str | None,
        "Column that names where a pair comes from. By default `source` where the data has it, "
        "else the name of the file or data set.",
    ] = None
    pairs_from: Annotated[
        Literal["best-worst", "all", "adjacent"] | None,
        "Which pairs a row of scored responses gives: the best and the worst (the default), all, "
        "or neighbours in the order of their scores. Ties give none.",
    ] = None
    score_column: Annotated[
        str | None,
        "What holds the score of a response, in it or in a list beside; a name with `rank` counts "
        "from the best. By default `overall_score`, `score`, `rating`, `rank`, …",
    ] = None
    min_gap: Annotated[float, "Smallest difference of two scores that make a pair."] = 0.0
    validation_fraction: Annotated[
        float, "Share of groups to hold out, chosen by a digest. See --group-by."
    ] = 0.0
    validation_source: Annotated[
        str | None,
        "Files or data sets to hold out, as for SOURCE. Training pairs of the same groups are "
        "left out and counted.",
    ] = None
    group_by: Annotated[
        Literal["first-turn", "prompt"],
        "What must not stand on both sides of the split: conversations with the same first user "
        "turn, or the same whole prompt.",
    ] = "first-turn"
    group_column: Annotated[
        str | None, "Column whose value takes the place of --group-by, such as a document's id."
    ] = None
    exclude: Annotated[
        str | None,
        "Reviewed tables of `mrpo audit`, comma-separated: leave out the pairs whose decision is "
        "exclude, or all where there is no such column.",
    ] = None
    flip: Annotated[
        str | None,
        "Reviewed tables likewise: swap chosen and rejected of the pairs whose decision is flip.",
    ] = None
    decontaminate: Annotated[
        str | None,
        "Files of evaluation texts, as for SOURCE: leave out the pairs whose prompt contains one, "
        "as 13 words in a row.",
    ] = None
    strict: Annotated[bool, "Stop at the first row that cannot be used."] = False
    allow_dropped: Annotated[bool, "Continue when more than 5 % of the rows are unusable."] = False
    shard_pairs: Annotated[
        int, "Pairs in a shard; a full one still takes the further pairs of its last prompt."
    ] = 8192
    overwrite: Annotated[
        bool, "Replace other pairs in --out even where a store or an unfinished run uses them."
    ] = False

    def __post_init__(self) -> None:
        ColumnSettings.__post_init__(self)
        share(self, "validation_fraction")
        at_least_zero(self, "min_gap")
        if self.group_column is not None:
            no_effect(self, "with --group-column", "group_by")
        if self.validation_fraction and self.validation_source:
            raise UserError(
                f"--validation-fraction is {self.validation_fraction}, but --validation-source "
                "names what is held out; leave out one of the two"
            )
        if self.validation_fraction == 1:
            raise UserError(
                "--validation-fraction is 1.0; it must be below 1, to train on the rest"
            )
        if not 1 <= self.shard_pairs <= MAX_SHARD_PAIRS:
            raise UserError(
                f"--shard-pairs is {self.shard_pairs}; it must be between 1 and {MAX_SHARD_PAIRS}"
            )


@dataclass(kw_only=True, slots=True)
class InspectConfig(PairSettings):
    """Show a pair as a reference sees it: its template's text, and which of it is scored.

    The scored span and the end of turn are colored, or between brackets where there is no
    color. No weights are loaded. With --templates, a table in Markdown instead: which kinds of
    conversation each chat template of a folder can show, and how the response is found.

    Example: `mrpo inspect --ref llama --row 7 --tokens`
    """

    ref: Annotated[str | None, "Alias of the reference, or several as a,b,c."] = None
    row: Annotated[int, "Row of the pair in the data set, counted from 0."] = 0
    tokens: Annotated[bool, "List the tokens too: id, piece and part."] = False
    color: Annotated[
        Literal["auto", "always", "never"],
        "When to color; auto: on a terminal, unless NO_COLOR is set.",
    ] = "auto"
    templates: Annotated[
        str | None, "Folder of chat templates (*.jinja) to try, in place of a reference."
    ] = None
    tokenizer: Annotated[
        str | None,
        "Model or folder whose tokenizer --templates uses. By default bytes, and as special "
        "tokens what looks like one in the template.",
    ] = None

    def __post_init__(self) -> None:
        if (self.ref is None) == (self.templates is None):
            raise UserError("name a reference with --ref, or a folder with --templates")
        if self.tokenizer is not None and self.templates is None:
            raise UserError("--tokenizer goes with --templates; a reference has its own")
        if self.templates is not None:
            no_effect(self, "with --templates", "row", "tokens", "color", "pairs", "refs_config")


@dataclass(kw_only=True, slots=True)
class StatusConfig(StoreSettings):
    """List what the store holds: references by rows, bytes, identity, date and engine.

    With --pairs also how many of these pairs each reference has not scored yet.

    Example: `mrpo store status --store store --pairs pairs`
    """

    pairs: Annotated[
        str | None, "Folder of pairs; count which of them each reference has not scored."
    ] = None
    policies: Annotated[
        bool,
        "List the policies that `mrpo evaluate` and `mrpo compare` scored, not the references.",
    ] = False


@dataclass(kw_only=True, slots=True)
class VerifyConfig(StoreSettings):
    """Check every file of the store against its digest; changes nothing.

    Exit code 1 where anything is damaged: the next `mrpo precompute` sets the file aside and
    scores its rows again. With --rescore a sample is scored again too, and compared.

    Example: `mrpo store verify --store store --rescore 100 --refs-config configs/refs.yaml`
    """

    refs: Annotated[str | None, STORED_REFERENCES] = None
    rescore: Annotated[int, "Pairs to score again for each reference and compare; 0: none."] = 0
    refs_config: Annotated[str, "For --rescore: the file of the references."] = "configs/refs.yaml"
    pairs: Annotated[
        str | None, "Folder of pairs to sample from. By default the one that was scored last."
    ] = None

    def __post_init__(self) -> None:
        at_least_zero(self, "rescore")
        if not self.rescore:
            no_effect(self, "without --rescore", "pairs", "refs_config")


@dataclass(kw_only=True, slots=True)
class UpgradeConfig(StoreSettings):
    """Move the scores of a store that an earlier version wrote over; nothing is scored again.

    Rows were pairs then and are responses now, so the pairs' texts are needed. Rows of pairs in
    none of the folders are kept aside and counted; a later run with their folder moves them too.

    Example: `mrpo store upgrade --store store --pairs pairs,pairs-flip`
    """

    pairs: Annotated[
        str | None,
        "Folders of prepared pairs, comma-separated. By default those that were scored, where they "
        "are still there.",
    ] = None


@dataclass(kw_only=True, slots=True)
class GcConfig(StoreSettings):
    """List what the store no longer needs, and with --delete remove it.

    That is: files of writers that died, files set aside as damaged, files whose rows are all in
    other files, scores of policies, and references that a later commit or changed weights replaced
    under every alias they had, unless a run under --runs names them.

    Example: `mrpo store gc --store store --runs runs --delete`
    """

    runs: Annotated[
        str, "Folders of runs, comma-separated; the references that their files name are kept."
    ] = "runs"
    delete: Annotated[bool, "Remove what is listed."] = False


@dataclass(kw_only=True, slots=True)
class PushConfig(StoreSettings):
    """Copy references and scores to another store; what it has already is not sent again.

    To hf://datasets/org/name all files go in as few commits as possible.

    Example: `mrpo store push s3://team/store --store store --refs llama,qwen`
    """

    target: Annotated[str, Arg("The other store: a folder, s3://…, gs://… or hf://datasets/….")]
    refs: Annotated[str | None, STORED_REFERENCES] = None


@dataclass(kw_only=True, slots=True)
class PullConfig(StoreSettings):
    """Copy references and scores from another store; damaged files are left behind.

    Example: `mrpo store pull hf://datasets/org/scores --store store`
    """

    source: Annotated[str, Arg("The other store: a folder, s3://…, gs://… or hf://datasets/….")]
    refs: Annotated[str | None, STORED_REFERENCES] = None


@dataclass(kw_only=True, slots=True)
class ImportConfig(ColumnSettings):
    """Bring in scores that others computed: TRL's columns, a CSV, a reference behind an API.

    Rows are pairs in any format that `mrpo prepare` reads, with the log-prob of each response
    beside them (natural log, summed over the response). They are marked as imported, because
    nothing here can say what computed them. Scores that differ from those that the reference has
    already are refused without --replace.

    Example: `mrpo store import scores.csv --alias judge --model "judge-v2 by its API"`
    """

    source: Annotated[str, Arg("Files or org/name:split, as for `mrpo prepare`.")]
    alias: Annotated[str, "The name that --refs will use."]
    model: Annotated[
        str,
        "What computed the scores; another text is another reference, to be named as alias@prefix.",
    ]
    store: StoreRoot = None
    chosen_logps_column: Annotated[str, "Column of the chosen response's log-prob, in nats."] = (
        "ref_chosen_logps"
    )
    rejected_logps_column: Annotated[
        str, "Column of the rejected response's log-prob, in nats."
    ] = "ref_rejected_logps"
    chosen_tokens_column: Annotated[
        str, "Column of the chosen response's number of tokens, where known."
    ] = "ref_chosen_tokens"
    rejected_tokens_column: Annotated[
        str, "Column of the rejected response's number of tokens, where known."
    ] = "ref_rejected_tokens"
    by_id: Annotated[
        bool, "Rows have the `pair_id` (hex) of a prepared pair in place of prompt and responses."
    ] = False
    pairs: Annotated[
        str | None, "For --by-id: the folder of prepared pairs. By default `pairs`."
    ] = None
    replace: Annotated[
        bool,
        "Where scores differ from the stored ones: a new identity with these in their place, which "
        "the alias means from then on.",
    ] = False

    def __post_init__(self) -> None:
        ColumnSettings.__post_init__(self)
        if self.by_id:
            columns = ("prompt_column", "chosen_column", "rejected_column")
            no_effect(self, "with --by-id", *columns, "chat", "map", "ignore_columns")
        else:
            no_effect(self, "without --by-id", "pairs")
