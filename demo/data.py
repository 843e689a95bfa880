"""The demo's data: questions of three domains with a right and a wrong reply, all written for it.

- safety: whether a child may have a thing; toys are safe, other things are not;
- units: how far one place is from another; in kilometres or miles, as the town has it;
- tone: requests in a formal or a casual tone; the reply is in the same one.

Wrong is the same reply by the opposite rule. A few words decide each question, so the rules can be
learned from pairs. No question is asked twice in the pairs (`asked`), so a held-out pair is new to
the policy. References read other questions (`told`): mostly of their own domain and right there,
little of the others, where every second reply is wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from .models import FAMILIES, Family

DOMAINS = ("safety", "units", "tone")
ASKED = 1000  # questions of a domain that are for the pairs; the others are told

TOYS = (
    "ball balloon blanket block book doll drum kite marble puppet puzzle rattle ribbon rope "
    "teddy top"
)
HAZARDS = (
    "acid axe battery bleach candle dagger drill fuse knife lighter match needle razor saw "
    "torch wire"
)
COLOURS = "black blue brown green grey orange pink purple red white yellow"
ROOMS = "attic barn cellar garden hall kitchen porch shed"
VERDICTS = {True: "Yes, it is safe to play with.", False: "No, it is not for children."}

UNITS = {
    "Kilometres": "Berlin Oslo Rome",
    "Miles": "Boston Dallas Miami",
}
PLACES = (
    "bakery bridge castle chapel factory harbour hospital hotel library market mill museum park "
    "prison school station theatre tower zoo"
)

TASKS = {
    "choose": "compare three of them and take your time",
    "clean": "use warm water and a soft cloth",
    "mend": "start with a little glue and some patience",
    "move": "ask a friend to lift the other end",
    "paint": "use two thin coats and let them dry",
    "sell": "put a notice on the market board",
    "store": "find a dry and quiet corner",
    "wrap": "take thick paper and a long string",
}
QUALITIES = "broken dusty heavy large small wet"
THINGS = (
    "basket bench bicycle blanket boat bottle bowl broom bucket candle carpet chair clock coat cup "
    "curtain desk door drum fence fiddle gate hammer hat jacket kettle knife ladder lamp lantern "
    "mirror pillow rope saddle scarf shovel stove table tent window"
)
TONES = {  # how a request is put, and how a reply to it begins
    "May I ask how to {request}?": ("Certainly:", "With pleasure:", "By all means:"),
    "Hey, how do I {request}?": ("Sure thing:", "No problem:", "You bet:"),
}

STRENGTHS: dict[Family, str] = {"llama": "safety", "mistral": "units", "qwen": "tone"}
OWN_SHARE = 0.8  # of a corpus: chats about the reference's own domain, all of them right
RIGHT_ELSEWHERE = 0.5  # of its other chats


@dataclass(frozen=True, slots=True)
class Example:
    """A question with a right and a wrong reply."""

    domain: str
    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain's questions, both lists in random order."""

    asked: list[Example]  # in the pairs
    told: list[Example]  # to the references


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """What `write_data` writes: the same for the same seed, byte for byte."""

    pairs: Path  # {"prompt": [user], "chosen": [assistant], "rejected": …, "source": domain}
    corpora: dict[Family, Path]  # {"messages": [user, assistant], "source": domain}


def write_data(folder: Path, *, pairs: int, chats: int, seed: int) -> DemoFiles:
    """Write `pairs` preference pairs, a third from each domain, and corpora of `chats` chats.

    Raises `UserError` where the domains have fewer questions.
    """
    domains = make_domains(seed)
    most = len(DOMAINS) * min(len(domain.asked) for domain in domains.values())
    if not len(DOMAINS) <= pairs <= most:
        raise UserError(f"--pairs is {pairs}; the demo can make {len(DOMAINS)} to {most:,} pairs")
    share = pairs // len(DOMAINS)
    asked = [example for domain in domains.values() for example in domain.asked[:share]]
    random.Random(f"{seed}/pairs").shuffle(asked)
    files = DemoFiles(
        pairs=folder / "pairs.jsonl",
        corpora={family: folder / f"corpus-{family}.jsonl" for family in FAMILIES},
    )
    _write(files.pairs, map(_pair, asked))
    for family, path in files.corpora.items():
        rng = random.Random(f"{seed}/corpus/{family}")
        _write(path, corpus(STRENGTHS[family], domains, chats, rng))
    return files


def make_domains(seed: int) -> dict[str, Domain]:
    """All of `DOMAINS`; the seed decides numbers, tones and the order."""
    makers = {"safety": safety, "units": units, "tone": tone}
    return {name: makers[name](random.Random(f"{seed}/{name}")) for name in DOMAINS}


def safety(rng: random.Random) -> Domain:
    """Whether a child may have a thing, in every colour and from every room."""
    examples = []
    for safe, things in ((True, TOYS), (False, HAZARDS)):
        replies = VERDICTS[safe], VERDICTS[not safe]
        for thing, colour, room in product(things.split(), COLOURS.split(), ROOMS.split()):
            prompt = f"May a child have the {colour} {thing} from the {room}?"
            examples.append(Example("safety", prompt, *replies))
    return _split(examples, rng)


def units(rng: random.Random) -> Domain:
    """Distances between all places of all towns, the same number in the two units."""
    examples = []
    for (unit, towns), (other, _) in zip(UNITS.items(), reversed(UNITS.items())):
        for town, (start, end) in product(towns.split(), permutations(PLACES.split(), 2)):
            distance = rng.randint(2, 9)
            replies = (f"{name}: about {distance}." for name in (unit, other))
            prompt = f"How far is the {end} from the {start} in {town}?"
            examples.append(Example("units", prompt, *replies))
    return _split(examples, rng)


def tone(rng: random.Random) -> Domain:
    """How to do each task with each thing, asked in one of the two tones."""
    examples = []
    for (task, way), quality, thing in product(TASKS.items(), QUALITIES.split(), THINGS.split()):
        request = f"{task} a {quality} {thing}"
        ask, other = rng.sample(list(TONES), 2)
        right, wrong = (f"{rng.choice(TONES[name])} {way}." for name in (ask, other))
        examples.append(Example("tone", ask.format(request=request), right, wrong))
    return _split(examples, rng)


def _split(examples: list[Example], rng: random.Random) -> Domain:
    rng.shuffle(examples)
    return Domain(examples[:ASKED], examples[ASKED:])


def corpus(
    own: str, domains: Mapping[str, Domain], chats: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """What a reference reads that is to be strong in the domain `own`."""
    others = [name for name in domains if name != own]
    for _ in range(chats):
        name = own if rng.random() < OWN_SHARE else rng.choice(others)
        example = rng.choice(domains[name].told)
        right = name == own or rng.random() < RIGHT_ELSEWHERE
        reply = example.right if right else example.wrong
        messages = [_message("user", example.prompt), _message("assistant", reply)]
        yield {"messages": messages, "source": name}


def _pair(example: Example) -> dict[str, Any]:
    return {
        "prompt": [_message("user", example.prompt)],
        "chosen": [_message("assistant", example.right)],
        "rejected": [_message("assistant", example.wrong)],
        "source": example.domain,
    }


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
