"""Flags that a command may not like, and the same settings in a damaged YAML file."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from mrpo.settings import Setting, Several, options, settings_of
from mrpo.tests.fuzz.damage import damage
from mrpo.tests.fuzz.world import Command

NUMBERS = ["0", "1", "-1", "2", "0.5", "1e308", "1e-320", "nan", "inf", "-inf", "1e999", "x", ""]
NUMBERS += [str(2**32), str(2**63), str(-(2**63) - 1), "1" * 5000, "1_0", " 1", "٣", "0x1", "none"]
PATHS = ["", ".", "no/such", "pairs", "rows/chat.jsonl", "refs.yaml", "a" * 300, "a\tb", "é", "-"]
PATHS += ["store", "models/llama", "rows/chat.jsonl/x", "x.json", "x.csv", "x.html", "link"]
PATHS += ["llama", "hub/none:train", "http://localhost:1", "s3:", "run", "compare", "~", "a@b"]
TEXTS = ["", ",", "x", "llama", "llama,llama", "llama,nobody", "llama@", "llama@0", "a=b", "prompt"]
TEXTS += ["chosen={rejected}", "prompt={", "prompt={0}", "x" * 3000, "none", "0.5,0.5"]
TEXTS += ["nan,1", "mrpo", "mrpo:qwen/llama", "dpo:x", "mrpo+", "dpo:llama+uniform", "[", "*", "é"]


def damaged_words(rng: random.Random, command: Command) -> tuple[list[str], str]:
    """The command's words with a few flags added or changed, or with words damaged as such."""
    words, titles = command.words.split(), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.06:
            at = rng.randrange(len(words))
            words[at : at + 1] = rng.choice([[], [words[at]] * 2, ["--"], ["--no-such"], ["é"]])
            titles.append("a word")
            continue
        setting = rng.choice([s for s in settings_of(command.config) if not s.positional])
        value = _flag_value(rng, setting)
        titles.append(f"{setting.flag} {'' if value is None else repr(value[:40])}")
        if value is None:
            words.append(setting.flag)
        elif setting.flag in words[:-1]:
            words[words.index(setting.flag) + 1] = value
        else:
            words += [setting.flag, value]
    return words, ", ".join(titles)


def _flag_value(rng: random.Random, setting: Setting) -> str | None:
    """A value that a flag may not like; None where it takes none."""
    admitted = options(setting.type)
    if admitted == (bool,):
        return None
    literals = [value for value in admitted if isinstance(value, str)]
    if setting.name == "map":
        field = rng.choice(["prompt", "chosen", "source", "split", "scores", "x"])
        return f"{field}={rng.choice(TEXTS)}"
    if literals:
        return rng.choice([*literals, "x", ""])
    if float in admitted or int in admitted:
        return rng.choice(NUMBERS)
    return rng.choice(TEXTS if Several in admitted or rng.random() < 0.4 else PATHS)


def damaged_settings(rng: random.Random, command: Command, folder: Path) -> tuple[list[str], str]:
    """The same settings in a YAML file with something wrong in it."""
    words, values = command.words.split(), dict[str, Any]()
    positional = [s.name for s in settings_of(command.config) if s.positional]
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            values[positional[0]] = word
        elif words and not words[0].startswith("--"):
            values[word[2:]] = words.pop(0)
        else:
            values[word[2:]] = True
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    given = [values[name] for name in positional if name in values]
    return [*given, "--config", "settings.yaml"], damage(rng, path)
