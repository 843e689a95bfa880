"""`mrpo inspect`: a pair as a reference sees it, token by token.

Prints the text that the reference's chat template makes of each branch, with the scored span, the
end of turn and a token across the boundary marked, and on request every token with its id.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_text
from ..settings import command
from .config import InspectConfig
from .pairs import Message, Pair
from .references import ReferenceSpec, load_refs, select_refs
from .rendering import (
    PLACES,
    ExplainedSequence,
    Refusal,
    Renderer,
    byte_tokenizer,
    load_tokenizer,
)
from .shards import PairShards

# Part of a sequence -> ANSI color, and the brackets that replace it without color.
LOOKS = {
    "prompt": ("2", "", ""),
    "boundary": ("1;33", "<<", ">>"),
    "response": ("32", "[[", "]]"),
    "end": ("1;35", "{{", "}}"),
}


@command(InspectConfig)
def inspect(config: InspectConfig) -> None:
    """Print the pair for each reference named, or the table of a folder of templates."""
    if config.templates is not None:
        for line in template_table(Path(config.templates), config.tokenizer):
            print(line)
        return
    assert config.ref is not None
    specs = select_refs(load_refs(config.refs_config), config.ref)
    pair = _pair_at(PairShards(config.pairs), config.row)
    color = config.color == "always" or (
        config.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    print(f"row {config.row} of {config.pairs}: pair {pair.id.hex()}, {pair.split}, {pair.source}")
    for spec in specs:
        renderer = Renderer.of_reference(spec)
        for line in describe_pair(spec, renderer, pair, tokens=config.tokens, color=color):
            print(line)


def template_table(folder: Path, tokenizer: str | None = None) -> Iterator[str]:
    """A table in Markdown: how each template of a folder renders each of `TRIALS`, or why not."""
    paths = sorted(folder.glob("*.jinja"))
    if not paths:
        raise UserError(f"--templates {folder}: no *.jinja there; name a folder of chat templates")
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    yield f"| template | {' | '.join(TRIALS)} |"
    yield "|---" * (len(TRIALS) + 1) + "|"
    for path in paths:
        source = read_text(path)
        try:
            renderer = Renderer(loaded or byte_tokenizer(source), chat_template=source)
            cells = [outcome(renderer, pair) for pair in TRIALS.values()]
        except UserError:
            cells = ["unusable"] * len(TRIALS)  # it shows no answer without variables of its own
        yield f"| {path.stem} | {' | '.join(cells)} |"


def outcome(renderer: Renderer, pair: Pair) -> str:
    """How a pair's responses are found, or the reason why they are not scored."""
    explained = renderer.explain(pair)
    if isinstance(explained, Refusal):
        return explained.reason
    system = pair.prompt[0]["content"] if pair.prompt[0]["role"] == "system" else ""  # type: ignore[index]
    if system not in explained[0].rendered.text:
        return "system message not shown"
    return ", ".join(dict.fromkeys(branch.rendered.place for branch in explained))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def _called(total: int) -> list[Message]:
    """A call of a tool, and its result."""
    arguments = {"expression": "17 + 25", "unit": "apples"}
    call = {
        "id": "call00001",
        "type": "function",
        "function": {"name": "calculate", "arguments": arguments},
    }
    result = {"role": "tool", "name": "calculate", "tool_call_id": "call00001"}
    return [_assistant("", tool_calls=[call]), {**result, "content": f"total: {total}"}]


_TEXT = {"type": "string", "description": "A text."}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculate",
            "description": "Computes a sum.",
            "parameters": {
                "type": "object",
                "properties": {"expression": _TEXT, "unit": _TEXT},
                "required": ["expression"],
            },
        },
    }
]
_ASKED = _user("How many apples are 17 and 25?")
_ANSWERS = [_assistant("It is 42 apples.")], [_assistant("Perhaps 41, or so?")]
_THOUGHT = (
    [_assistant("It is 42 apples.", reasoning_content="Ten and twenty, seven and five.")],
    [_assistant("Perhaps 41, or so?", reasoning_content="A guess will do.")],
)
# What the table of templates tries: kind of conversation -> pair.
TRIALS = {
    "one turn": Pair([_ASKED], *_ANSWERS),
    "system": Pair([{"role": "system", "content": "Count with care."}, _ASKED], *_ANSWERS),
    "many turns": Pair([_user("Hi!"), _assistant("Hello there."), _ASKED], *_ANSWERS),
    "tools": Pair([_ASKED, *_called(42)], *_ANSWERS, tools=_TOOLS),
    "tool turns in the answer": Pair(
        [_ASKED], [*_called(42), *_ANSWERS[0]], [*_called(41), *_ANSWERS[1]], tools=_TOOLS
    ),
    "reasoning in the answer": Pair([_ASKED], *_THOUGHT),
}


def describe_pair(
    spec: ReferenceSpec, renderer: Renderer, pair: Pair, *, tokens: bool, color: bool
) -> Iterator[str]:
    """The lines that show a pair as a reference sees it."""
    yield f"\n{spec.alias} ({spec.model}): {_end_of_turn(renderer, pair)}"
    explained = renderer.explain(pair)
    if isinstance(explained, Refusal):
        yield f"not scored, {explained.reason}: {explained.detail}"
        return
    if pair.is_chat:
        yield from dict.fromkeys(PLACES[branch.rendered.place] for branch in explained)
        if known := renderer.template.thinking_kwargs:
            yield f"its template knows chat_template_kwargs {', '.join(known)}"
    else:
        found = (renderer.own_end(str(turns)) for turns in (pair.chosen, pair.rejected))
        if ends := sorted({end for end in found if end}):
            yield f"its text ends with its own {' and '.join(map(repr, ends))}; none is added"
    names = [_paint(name, name.replace("end", "end of turn"), color) for name in LOOKS]
    yield "marked: " + ", ".join(names)
    for name, branch in zip(("chosen", "rejected"), explained):
        sequence = branch.sequence
        scored, end = sequence.num_scored, sequence.end_start
        yield (
            f"\n{name}: {sequence.start} tokens before it, {scored} scored, "
            f"{len(sequence.token_ids) - end} of them end of turn"
            + (", the first across the boundary" if sequence.boundary else "")
            + (", a tool's turns between them" if sequence.context else "")
        )
        yield marked_text(branch, color)
        if tokens:
            yield from _token_lines(branch, color)


def marked_text(branch: ExplainedSequence, color: bool) -> str:
    """The whole text of a branch with its parts marked; control characters are escaped."""
    text, sequence = branch.rendered.text, branch.sequence
    prompt_end, content_end = branch.rendered.prompt_end, branch.rendered.content_end
    first, first_end = branch.spans[sequence.start]
    parts = [("prompt", text[:prompt_end])]
    if sequence.boundary:
        parts = [("prompt", text[:first]), ("boundary", text[first:first_end])]
        prompt_end = first_end
    for begin, end in branch.rendered.context:
        parts += [("response", text[prompt_end:begin]), ("prompt", text[begin:end])]
        prompt_end = end
    parts += [("response", text[prompt_end:content_end])]
    parts += [("end", text[max(prompt_end, content_end) :])]
    if branch.spans[0] == (0, 0):  # BOS and EOS added to plain text
        parts.insert(0, ("prompt", branch.tokens[0]))
    if branch.spans[-1] == (len(text), len(text)):
        parts.append(("end", branch.tokens[-1]))
    return "".join(_paint(name, _visible(part), color) for name, part in parts if part)


def _token_lines(branch: ExplainedSequence, color: bool) -> Iterator[str]:
    sequence = branch.sequence
    for index, token_id in enumerate(sequence.token_ids):
        begin, end = branch.spans[index]
        part = "prompt" if index < sequence.start else "response"
        if index == sequence.start and sequence.boundary:
            part = "boundary"
        elif any(first <= index < stop for first, stop in sequence.context):
            part = "prompt"
        elif index >= sequence.end_start:
            part = "end"
        piece = _visible(branch.tokens[index], newline="")
        under = _visible(branch.rendered.text[begin:end], newline="")
        line = f"{index:>6} {token_id:>7}  {part:<9} {piece:<20} '{under}'"
        yield _paint(part, line, color, brackets=False)


def _pair_at(pairs: PairShards, row: int) -> Pair:
    if not 0 <= row < pairs.num_pairs:
        raise UserError(
            f"--row {row}: {pairs.path} has rows 0 to {pairs.num_pairs - 1}; name one of them"
        )
    shard = 0
    while row >= pairs.rows[shard]:
        row -= pairs.rows[shard]
        shard += 1
    return pairs.pairs(shard, [row])[0]


def _end_of_turn(renderer: Renderer, pair: Pair) -> str:
    if not pair.is_chat:
        warning = (
            ", though the model has a chat template" if renderer.chat_template is not None else ""
        )
        return f"plain text{warning}; it ends with {renderer.tokenizer.eos_token!r}"
    if renderer.end_of_turn is None:
        return "its chat template has no special token at the end of a turn"
    return f"its chat template ends a turn with {renderer.end_of_turn!r}"


def _visible(text: str, newline: str = "\n") -> str:
    """The text with line breaks shown and control characters escaped."""
    shown = (
        "↵" + newline if char == "\n" else char if char.isprintable() else repr(char)[1:-1]
        for char in text
    )
    return "".join(shown)


def _paint(part: str, text: str, color: bool, brackets: bool = True) -> str:
    code, opening, closing = LOOKS[part]
    if not color:
        return f"{opening}{text}{closing}" if brackets else text
    # Line by line: a pager resets colors at the end of each.
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
