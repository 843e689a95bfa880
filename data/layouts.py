"""What people's files look like: which columns hold the pairs, and how a row becomes examples.

`sources.py` reads rows, `formats.py` makes pairs of the examples that are found here. The columns
of a row decide, in this order:

    chosen, rejected             preference pairs: TRL, HH-RLHF, Alpaca, ShareGPT
    input, preferred_output, …   OpenAI's preference pairs
    completions (responses, …)   several responses with scores or ranks: UltraFeedback, Nectar
    completion, label            single labelled responses (KTO), paired by their prompt

`--map` builds any field from other columns. Columns that nothing uses are remembered for the
summary; one whose name says that it belongs to the prompt stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

from ..errors import UserError
from .config import ColumnSettings
from .fields import (
    Fields,
    Row,
    RowField,
    as_number,
    column_field,
    decoded,
    joined_field,
    mapped_field,
    parse_template,
    split_of,
    text_field,
    with_history,
)
from .formats import Broken, RawPair
from .labelled import Waiting
from .sources import Source, SourceColumns, missing_column

IN_VALIDATION = "in_validation"
# Why responses gave no pair though nothing is wrong with them.
LEFT_OUT = {
    "tie": "two responses with the same score",
    "below_min_gap": "two responses whose scores differ by less than --min-gap",
    "no_score": "a response without a score",
    "single_response": "a row with fewer than two scored responses",
    IN_VALIDATION: "a training pair whose prompt or group is in the held-out data",
    "contaminated": "a pair whose prompt contains a text of --decontaminate",
    "unpaired": "a labelled response without one of the other label for its prompt",
}

INSTRUCTIONS = ("instruction", "question", "query")  # prompts that are messages, not bare text
CONVERSATIONS = ("conversations", "conversation", "messages")
SYSTEMS = ("system", "system_prompt", "system_message")
RESPONSES = ("completions", "responses", "answers", "generations")
RESPONSE_TEXTS = ("response", "text", "completion", "answer", "solution", "output", "message")
LABELS = ("label", "kto_tag")
SCORES = (
    *("overall_score", "score", "rating", "rank", "label", "is_correct"),
    *("fine-grained_score", "reward"),
)
SCORE_LISTS = ("scores", "ratings", "ranks", "rank", "labels", "rewards")
# Columns that look like a part of the prompt: not using them is a mistake, or a decision.
PROMPT_LIKE = {
    *("input", "context", "history", "document", "passage", "tools"),
    *(*INSTRUCTIONS, *SYSTEMS, "conversation", "conversations"),
}
FLAGS = (
    "name columns with --prompt-column, --chosen-column and --rejected-column, "
    "or build them with --map"
)
Examples = Iterator[RawPair | str]  # a text is a key of `LEFT_OUT`


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the rows with the same columns are read."""

    kind: str
    fields: list[RowField]
    expand: Callable[[int, Row], Examples]
    columns: list[str] = field(default_factory=list)


class RowReader:
    """Finds the examples in the rows of one source, and the columns that were not used."""

    def __init__(self, settings: ColumnSettings, beside: SourceColumns | None = None) -> None:
        """`beside`: further columns to read; a row must then be a single pair."""
        self.rows = 0
        self.formats: dict[str, None] = {}  # in the order in which they were met
        self.unused: dict[str, None] = {}
        self.has_split = False  # whether a row so far has a split column
        self._settings = settings
        self._beside = beside
        self._maps = {name: parse_template(text) for name, text in settings.mapped().items()}
        self._ignored = dict.fromkeys(settings.ignored(), False)  # whether it was there
        self._plans: dict[tuple[str, ...], tuple[_Plan, bool]] = {}
        self._waiting: Waiting | None = None

    @property
    def ignored_nowhere(self) -> list[str]:
        """Columns of --ignore-columns that no row had."""
        return [name for name, was_there in self._ignored.items() if not was_there]

    def examples(self, source: Source) -> Iterator[tuple[int, Row, RawPair | str]]:
        """For each example the number of its row, the row, and the example or why there is none.

        Raises `UserError` for broken structure, with the place.
        """
        for number, row in source.rows(self):
            self.rows += 1
            try:
                for example in self._plan.expand(number, row):
                    yield number, row, example
            except Broken as error:
                raise UserError(f"{source.given}, {source.unit} {number}, {error}") from None
        if self._waiting is not None:
            for number in self._waiting.rest():
                yield number, {}, "unpaired"

    def expand(self, row: Row) -> list[RawPair | str]:
        """The examples of a single row."""
        self.choose("the row: field", list(row))
        return list(self._plan.expand(1, row))

    def choose(self, place: str, existing: Sequence[str]) -> list[str]:
        """The columns to read; raises `UserError` where they make no pair. See `Columns`."""
        key = tuple(existing)
        if key not in self._plans:
            self._plans[key] = self._make_plan(place, existing)
        self._plan, has_split = self._plans[key]
        self.has_split |= has_split
        return self._plan.columns

    def _make_plan(self, place: str, existing: Sequence[str]) -> tuple[_Plan, bool]:
        self._ignored |= {name: True for name in self._ignored if name in existing}
        fields = {name: column_field(name) for name in existing if name not in self._ignored}
        fields |= {
            name: mapped_field(name, template, place, existing)
            for name, template in self._maps.items()
        }
        plan = self._layout(place, fields)
        for name in self._maps:
            if fields[name] not in plan.fields:
                raise UserError(
                    f"--map {name} is not used: the rows are read as {plan.kind}; leave it out"
                )
        used = [name for value in plan.fields for name in value.columns]
        if self._beside is not None:
            used += self._beside.choose(place, existing)
        plan.columns.extend(dict.fromkeys(used))
        unused = [name for name in existing if name not in used]
        self.unused |= dict.fromkeys(unused)
        for name in unused:
            if name.lower() in PROMPT_LIKE and name not in self._ignored:
                raise UserError(
                    f"{place} {name!r} looks like a part of the prompt, and nothing uses it; use "
                    f"it, as in --map prompt='{{{name}}}…', or leave it out with "
                    f"--ignore-columns {name}"
                )
        return plan, "split" in fields

    # The layouts

    def _layout(self, place: str, fields: Fields) -> _Plan:
        names = self._settings
        responses = next((name for name in RESPONSES if name in fields), None)
        label = next((name for name in LABELS if name in fields), None)
        scored = names.pairs_from or names.score_column or names.min_gap
        if names.chosen_column in fields and names.rejected_column in fields and not scored:
            return self._pairs(place, fields)
        if self._beside is None:
            if {"input", "preferred_output", "non_preferred_output"} <= fields.keys():
                return self._openai(fields)
            if responses:
                return self._scored(place, fields, fields[responses])
            if "completion" in fields and label:
                return self._labelled(place, fields, fields[label])
        if scored:
            raise missing_column(
                place,
                RESPONSES[0],
                list(fields),
                "--pairs-from, --score-column and --min-gap are for rows of scored responses",
            )
        chosen = names.chosen_column
        missing = names.rejected_column if chosen in fields else chosen
        raise missing_column(place, missing, list(fields), FLAGS)

    def _pairs(self, place: str, fields: Fields) -> _Plan:
        chosen = fields[self._settings.chosen_column]
        rejected = fields[self._settings.rejected_column]
        prompt, shared, chat, kind = self._shared(place, fields)
        names = {"chosen": chosen.name, "rejected": rejected.name} | _named(prompt)
        kind = f"{kind} pairs ({chosen.name}, {rejected.name})"
        self.formats[kind] = None

        def expand(number: int, row: Row) -> Examples:
            values = {name: part.read(row) for name, part in shared.items()}
            values |= {"chosen": chosen.read(row), "rejected": rejected.read(row)}
            yield RawPair(values, names, chat)

        return _Plan(kind, [chosen, rejected, *shared.values()], expand)

    def _openai(self, fields: Fields) -> _Plan:
        asked, better, worse = (
            fields[name] for name in ("input", "preferred_output", "non_preferred_output")
        )
        others = self._others("", fields)
        kind = "OpenAI's preference pairs"
        self.formats[kind] = None
        names = {
            "prompt": "input.messages",
            "chosen": better.name,
            "rejected": worse.name,
            "tools": "input.tools",
        }

        def expand(number: int, row: Row) -> Examples:
            request = decoded("input", asked.read(row))
            if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
                raise Broken("input", "must be an object with messages")
            self._note(request.keys() - {"messages", "tools"}, "input")
            values = {name: part.read(row) for name, part in others.items()}
            values |= {
                "prompt": request["messages"],
                "tools": request.get("tools") or values.get("tools"),
                "chosen": decoded(better.name, better.read(row)),
                "rejected": decoded(worse.name, worse.read(row)),
            }
            yield RawPair(values, names, chat=True)

        return _Plan(kind, [asked, better, worse, *others.values()], expand)

    def _scored(self, place: str, fields: Fields, responses: RowField) -> _Plan:
        prompt, shared, chat, _ = self._shared(place, fields)
        if prompt is None:
            raise missing_column(place, "prompt", list(fields), FLAGS)
        kind, wanted = f"scored responses ({responses.name}", self._settings.score_column
        lists = ("scores",) if "scores" in self._maps else (wanted,) if wanted else SCORE_LISTS
        beside = next((fields[name] for name in lists if name in fields), None)
        way = self._settings.pairs_from or "best-worst"

        def expand(number: int, row: Row) -> Examples:
            values = {name: part.read(row) for name, part in shared.items()}
            scored, best_first, score_name = [], 1, None
            scores = None if beside is None else decoded(beside.name, beside.read(row))
            for index, (response, own) in enumerate(self._responses(responses, row)):
                name, score = f"{responses.name}[{index}]", _Missing
                if own is not None:
                    score_name, score = own
                    if beside is not None:
                        self.unused[beside.name] = None
                elif isinstance(scores, list) and index < len(scores):
                    assert beside is not None
                    score_name, score = beside.name, scores[index]
                if score is _Missing:
                    raise Broken(name, "has no score; --score-column names what holds it")
                number_of = as_number(f"{name}.{score_name}", score)
                if number_of is None:
                    yield "no_score"
                else:
                    best_first = -1 if "rank" in str(score_name).lower() else 1
                    scored.append((best_first * number_of, name, response))
            self.formats[f"{kind} by {score_name}, {way})"] = None
            if len(scored) < 2:
                yield "single_response"
                return
            for better, worse in _choose_pairs(scored, way):
                gap = better[0] - worse[0]
                if gap == 0 or gap < self._settings.min_gap:
                    yield "below_min_gap" if gap else "tie"
                    continue
                names = {"chosen": better[1], "rejected": worse[1]} | _named(prompt)
                pair = {"chosen": better[2], "rejected": worse[2]}
                yield RawPair(values | pair, names, chat)

        return _Plan(
            f"{kind})", [responses, *shared.values(), *([beside] if beside else [])], expand
        )

    def _responses(
        self, responses: RowField, row: Row
    ) -> Iterator[tuple[Any, tuple[str, Any] | None]]:
        """Each response of a row, with the name and the value of its own score if it has one."""
        items = decoded(responses.name, responses.read(row))
        if isinstance(items, dict):  # as some libraries give a list of structs
            columns = [value if isinstance(value, list) else [] for value in items.values()]
            items = [dict(zip(items, values)) for values in zip(*columns)]
        if not isinstance(items, list):
            raise Broken(responses.name, f"must be a list, not {type(items).__name__}")
        named = self._settings.score_column
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                yield item, None
                continue
            score = next((name for name in ((named,) if named else SCORES) if name in item), None)
            if "role" in item or "from" in item:
                response: Any = {name: value for name, value in item.items() if name != score}
            else:
                text = next((name for name in RESPONSE_TEXTS if name in item), "content")
                if text not in item:
                    known = ", ".join(RESPONSE_TEXTS)
                    raise Broken(f"{responses.name}[{index}]", f"has no text; it may be {known}")
                response = item[text]
                self._note(item.keys() - {text, score}, responses.name)
            yield response, None if score is None else (score, item[score])

    def _labelled(self, place: str, fields: Fields, label: RowField) -> _Plan:
        prompt, shared, chat, _ = self._shared(place, fields)
        if prompt is None:
            raise missing_column(place, "prompt", list(fields), FLAGS)
        completion = fields["completion"]
        kind = f"labelled responses ({completion.name}, {label.name})"
        names = {"chosen": completion.name, "rejected": completion.name} | _named(prompt)
        self.formats[kind] = None

        def expand(number: int, row: Row) -> Examples:
            is_good = as_number(label.name, label.read(row))
            if is_good not in (0, 1):
                yield "no_score"
                return
            values = {name: part.read(row) for name, part in shared.items()}
            response = completion.read(row)
            self._waiting = self._waiting or Waiting()
            met = self._waiting.meet(number, values, bool(is_good), response)
            if met is not None:
                other, split = met
                if split_of(split) == "validation":
                    values["split"] = split
                chosen, rejected = (response, other) if is_good else (other, response)
                yield RawPair(values | {"chosen": chosen, "rejected": rejected}, names, chat)

        return _Plan(kind, [completion, label, *shared.values()], expand)

    def _shared(self, place: str, fields: Fields) -> tuple[RowField | None, Fields, bool, str]:
        """The prompt, all fields but the responses, whether they are messages, and their kind."""
        prompt, chat, kind = self._prompt(place, fields)
        shared = self._others(place, fields) | ({} if prompt is None else {"prompt": prompt})
        return prompt, shared, chat or self._settings.chat or "system" in shared, kind

    def _others(self, place: str, fields: Fields) -> Fields:
        """The fields beside prompt and responses, by their names in an example."""
        settings = self._settings
        named = {"source": settings.source_column, "group": settings.group_column}
        others: Fields = {}
        for name in ("source", "split", "group", "tools", "chat_template_kwargs"):
            column = named.get(name) or name
            if named.get(name) and column not in fields:
                raise missing_column(place, column, list(fields), f"--{name}-column names it")
            if column in fields and (name != "group" or named["group"] or name in self._maps):
                others[name] = fields[column]
        if settings.source_column:
            others["source"] = text_field(others["source"])
        system = next((name for name in SYSTEMS if name in fields), None)
        return others | ({"system": fields[system]} if system else {})

    def _prompt(self, place: str, fields: Fields) -> tuple[RowField | None, bool, str]:
        """The prompt, whether it is a message though it is text, and the kind of data."""
        column = self._settings.prompt_column
        if column is not None:
            if column not in fields:
                raise missing_column(place, column, list(fields), FLAGS)
            return with_history(fields[column], fields)
        if "prompt" in fields:
            return with_history(fields["prompt"], fields)
        for name in INSTRUCTIONS:
            if name in fields:
                parts = [fields[part] for part in (name, "input") if part in fields]
                joined = parts[0] if len(parts) == 1 else joined_field(parts)
                prompt, _, _ = with_history(joined, fields)
                return prompt, True, "Alpaca" if name == "instruction" else "question"
        for name in CONVERSATIONS:
            if name in fields:
                kind = "conversation" if name == "messages" else "ShareGPT"
                return fields[name], True, kind
        if "input" in fields:
            prompt, _, _ = with_history(fields["input"], fields)
            return prompt, True, "input"
        return None, False, "preference"

    def _note(self, unused: set[str], inside: str) -> None:
        """Remember fields inside a column that nothing uses."""
        for name in sorted(unused, key=str):
            self.unused[f"{inside}.{name}"] = None


_Missing = object()


def _named(prompt: RowField | None) -> dict[str, str]:
    return {} if prompt is None else {"prompt": prompt.name}


def _choose_pairs(scored: list[tuple[float, str, Any]], way: str) -> Iterator[Any]:
    """Pairs of responses, each with the better first; of equal ones the earlier comes first."""
    if way == "best-worst":
        best = max(scored, key=lambda item: item[0])
        return iter([(best, min(scored, key=lambda item: item[0]))])
    ordered = sorted(scored, key=lambda item: -item[0])
    return combinations(ordered, 2) if way == "all" else pairwise(ordered)
