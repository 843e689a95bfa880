"""Write the demo's files: preference pairs of three domains, and what each reference reads.

    pairs.jsonl           {"prompt": [user], "chosen": [assistant], "rejected": …, "source": domain}
    corpus-llama.jsonl …  {"messages": [user, assistant], "source": domain}

A corpus is mostly about its reference's own domain, and right there; about the other domains it
has little, and every second reply is wrong. The same seed gives the same files, byte for byte.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .domains import DOMAINS, Domain, Example, make_domains
from .models import FAMILIES, Family

STRENGTHS: dict[Family, str] = {"llama": "facts", "mistral": "arithmetic", "qwen": "style"}
OWN_SHARE = 0.8  # of a corpus: chats about the reference's own domain, all of them right
RIGHT_ELSEWHERE = 0.5  # of its other chats


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """What `write_data` writes."""

    pairs: Path
    corpora: dict[Family, Path]


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
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(
        pairs=folder / "pairs.jsonl",
        corpora={family: folder / f"corpus-{family}.jsonl" for family in FAMILIES},
    )
    _write(files.pairs, map(_pair, asked))
    for family, path in files.corpora.items():
        rng = random.Random(f"{seed}/corpus/{family}")
        _write(path, corpus(STRENGTHS[family], domains, chats, rng))
    return files


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
        yield {"messages": [_user(example.prompt), _assistant(reply)], "source": name}


def _pair(example: Example) -> dict[str, Any]:
    return {
        "prompt": [_user(example.prompt)],
        "chosen": [_assistant(example.right)],
        "rejected": [_assistant(example.wrong)],
        "source": example.domain,
    }


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
