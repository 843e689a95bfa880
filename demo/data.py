"""The demo's data: questions of three domains with a right and a wrong reply, all written for it.

- facts: an invented world, so that nothing is contentious; wrong is another value of the same fact;
- arithmetic: sums of two-digit numbers in two steps; wrong ends 1, 2 or 10 off the result;
- style: requests in a formal or a casual tone; wrong is the same answer in the other tone.

No fact, sum or request is asked twice in the pairs (`asked`), so a held-out pair is new to the
policy. References read others (`told`): other sums and requests, the facts in other words; mostly
of their own domain and right there, little of the others, where every second reply is wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from .models import FAMILIES, Family

DOMAINS = ("facts", "arithmetic", "style")
ASKED = 1000  # sums, and as many requests, are for the pairs; the others are told

TOWN_STARTS = "Bel Cor Dun Eld Fen Gar Hol Kel Lor Mar Nor Ost Pel Rav Sil Tor Ven Wes Yar Zan"
TOWN_ENDS = "bury by dale ford haven mora mere stad ton wick"
FACTS = {
    "river": "Ander Brill Cress Dove Esker Fal Gild Hazel",
    "founder": "Agnes Bruno Clara Denis Edith Felix Greta Hugo",
    "crop": "barley beans flax hops maize oats plums rye",
    "craft": "baking dyeing fishing glazing pottery tanning weaving welding",
    "flag": "amber black blue green grey red violet white",
}
FACT_TOLD = ("What is the {fact} of {town}?", "Name the {fact} of {town}.")
FACT_ASKED = "Which {fact} does {town} have?"
FACT_REPLY = "The {fact} of {town} is {value}."

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

STRENGTHS: dict[Family, str] = {"llama": "facts", "mistral": "arithmetic", "qwen": "style"}
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
    """All of `DOMAINS`; the seed decides the world's facts, the wrong replies and the order."""
    makers = {"facts": facts, "arithmetic": sums, "style": style}
    return {name: makers[name](random.Random(f"{seed}/{name}")) for name in DOMAINS}


def facts(rng: random.Random) -> Domain:
    """Every fact of the world, told in two ways and asked in a third."""
    asked: list[Example] = []
    told: list[Example] = []
    towns = ["".join(parts) for parts in product(TOWN_STARTS.split(), TOWN_ENDS.split())]
    for town, (fact, values) in product(towns, FACTS.items()):
        value, *others = rng.sample(values.split(), len(values.split()))
        for question in (FACT_ASKED, *FACT_TOLD):
            right, wrong = (
                FACT_REPLY.format(fact=fact, town=town, value=answer)
                for answer in (value, rng.choice(others))
            )
            example = Example("facts", question.format(fact=fact, town=town), right, wrong)
            (asked if question == FACT_ASKED else told).append(example)
    rng.shuffle(asked)
    rng.shuffle(told)
    return Domain(asked, told)


def sums(rng: random.Random) -> Domain:
    """48 + 35 = 70 + 13 = 83, for all two-digit numbers, the larger one first."""
    examples = []
    for a in range(10, 100):
        for b in range(10, a + 1):
            steps = f"{a} + {b} = {a // 10 * 10 + b // 10 * 10} + {a % 10 + b % 10}"
            slip = rng.choice((-10, -2, -1, 1, 2, 10))
            right, wrong = f"{steps} = {a + b}.", f"{steps} = {a + b + slip}."
            examples.append(Example("arithmetic", f"What is {a} + {b}?", right, wrong))
    rng.shuffle(examples)
    return Domain(examples[:ASKED], examples[ASKED:])


def style(rng: random.Random) -> Domain:
    """How to do each task with each thing, asked in one of the two tones."""
    examples = []
    for (task, way), quality, thing in product(TASKS.items(), QUALITIES.split(), THINGS.split()):
        request = f"{task} a {quality} {thing}"
        tone, other_tone = rng.sample(list(TONES), 2)
        right, wrong = (f"{rng.choice(TONES[ask])} {way}." for ask in (tone, other_tone))
        examples.append(Example("style", tone.format(request=request), right, wrong))
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
