"""`mrpo prepare --decontaminate`: prompts that contain a text which models are evaluated on."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo.data import pairs as pairs_module
from mrpo.data.pairs import EvaluationTexts, Turns
from mrpo.errors import UserError
from mrpo.tests.data.raw_rows import all_pairs, chat_row, dropped, run, text_rows, write

WORDS = [f"word{number}" for number in range(30)]
LONG = " ".join(WORDS[:20])


def texts_in(folder: Path, texts: Sequence[Any]) -> EvaluationTexts:
    return EvaluationTexts(str(write(folder / "eval.jsonl", [{"question": t} for t in texts])))


def user(text: str, *more: str) -> Turns:
    return [{"role": "user", "content": content} for content in (text, *more)]


@pytest.mark.parametrize(
    ("prompt", "contained"),
    [
        (" ".join(WORDS[:13]), True),
        (" ".join(WORDS[3:16]), True),
        (" ".join(WORDS[:12]), False),
        (" ".join([*WORDS[:12], *WORDS[13:25]]), False),
        ("Please: " + ", ".join(WORDS[5:18]).upper() + "?!", True),
        (user(" ".join(WORDS[:13])), True),
        (user(" ".join(WORDS[:7]), " ".join(WORDS[7:20])), True),
        (user(" ".join(WORDS[:7]), " ".join(WORDS[7:19])), False),
        ([{"role": "system", "content": LONG}, {"role": "user", "content": "hello"}], True),
        ([{"role": "assistant", "tool_calls": []}, {"role": "user", "content": "hello"}], False),
        ("", False),
        ([], False),
    ],
)
def test_thirteen_words_in_a_row_of_one_message(
    tmp_path: Path, prompt: Turns, contained: bool
) -> None:
    texts = texts_in(tmp_path, ["another text of the same file is not it", LONG])
    place = f"{tmp_path}/eval.jsonl, line 2"
    assert texts.find([prompt, "nothing"]) == [place if contained else None, None]


def test_a_short_text_counts_whole_and_a_very_short_one_only_alone(tmp_path: Path) -> None:
    eight, seven = "What did the Romans do in their baths?", "Don’t all vampires live in Romania?"
    texts = texts_in(tmp_path, [eight, seven, "yes", "No."])
    found = texts.find(
        [
            "Q: what did the romans do, in their baths\nA:",
            "What did the Romans do in their houses?",
            "dont all VAMPIRES live in romania",
            "Q: Don't all vampires live in Romania? A:",
            user("Don't all vampires live in Romania?"),
            [
                {"role": "system", "content": "Be brief."},
                *user("Don't all vampires live in Romania"),
            ],
            user("Don't all vampires live in Romania?", "Why?"),
            [*user("Hi"), {"role": "system", "content": "Don't all vampires live in Romania?"}],
            user("Yes"),
            user("no"),
        ]
    )
    lines = [place and int(place.rpartition(" ")[2]) for place in found]
    assert lines == [1, None, 2, None, 2, 2, None, None, None, None]


def test_every_text_of_a_row_counts_in_any_kind_of_file(tmp_path: Path) -> None:
    row = {"id": 7, "choices": ["a", {"text": LONG}], "answer": None}
    (tmp_path / "eval.csv").write_text(f"n,text\n1,short\n2,{LONG}\n")
    files = f"{write(tmp_path / 'eval.jsonl', [{'q': 'x'}, row])},{tmp_path}/eval.csv"
    places = EvaluationTexts(files).find([LONG])
    assert places in ([f"{tmp_path}/eval.jsonl, line 2"], [f"{tmp_path}/eval.csv, row 2"])
    assert EvaluationTexts(f"{tmp_path}/eval.csv").find([LONG]) == [f"{tmp_path}/eval.csv, row 2"]
    write(tmp_path / "none.jsonl", [{"a": 1, "b": "two words"}])
    with pytest.raises(UserError, match=r"--decontaminate .*: no text of 3 or more words"):
        EvaluationTexts(str(tmp_path / "none.jsonl"))


def test_characters_without_spaces_between_words_are_words(tmp_path: Path) -> None:
    texts = texts_in(tmp_path, ["小明有三个苹果,他又买了五个,一共有几个苹果?"])
    found = texts.find(["请回答:小明有三个苹果,他又买了五个橘子", "小明有三个苹果", "他又买了书"])
    assert [place is not None for place in found] == [True, False, False]


TEXT = st.lists(st.sampled_from("abc"), max_size=20).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6), st.lists(TEXT, min_size=1, max_size=6))
def test_the_rule_in_plain_python_finds_the_same(
    tmp_path_factory: pytest.TempPathFactory, evaluation: list[str], prompts: list[str]
) -> None:
    def plain(prompt: str) -> bool:
        for words in map(str.split, evaluation):
            length = min(len(words), 13)
            runs = {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
            given = prompt.split()
            if length >= 8 and any(
                tuple(given[i : i + length]) in runs for i in range(len(given) - length + 1)
            ):
                return True
            if 3 <= length < 8 and given == words:
                return True
        return False

    folder = tmp_path_factory.mktemp("plain")
    if all(len(text.split()) < 3 for text in evaluation):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module, "TEXTS_AT_ONCE", 2)
        texts = texts_in(folder, evaluation)
    assert [place is not None for place in texts.find(prompts)] == [plain(p) for p in prompts]


def test_contaminated_pairs_are_dropped_counted_and_listed(tmp_path: Path, mrpo: Any) -> None:
    rows = [*text_rows(20), {"prompt": f"Repeat: {LONG}", "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": LONG, "chosen": "c", "rejected": "d", "split": "test"}]
    rows = [{"split": "train"} | row for row in rows]
    evaluation = write(tmp_path / "eval.jsonl", [{"q": "nothing of it is there"}, {"q": LONG}])
    source = write(tmp_path / "rows.jsonl", rows)
    ran = mrpo("prepare", source, "--out", tmp_path / "pairs", "--decontaminate", evaluation)
    assert ran.code == 0, ran.err  # 9 % of the rows, but nothing is wrong with them
    assert "left    2 contaminated: a pair whose prompt contains a text of --decontam" in ran.out
    shards = run(source, tmp_path / "pairs", decontaminate=str(evaluation))
    assert len(all_pairs(shards)) == 20
    assert shards.manifest["left_out"] == {"contaminated": 2}
    assert dropped(shards) == [(21, "contaminated"), (22, "contaminated")]
    lines = [json.loads(line) for line in (shards.path / "dropped.jsonl").open()]
    assert {line["contains"] for line in lines} == {f"{evaluation}, line 2"}


def test_test_questions_among_training_questions_are_found(
    tmp_path: Path, shared_data: Path
) -> None:
    """GSM8K's test set in other dress among its training set, and TruthfulQA's among dialogues."""

    def questions(name: str) -> list[str]:
        with gzip.open(shared_data / name, "rt", encoding="utf-8") as file:
            return [json.loads(line)["question"] for line in file]

    train, test = (questions(f"gsm8k_{split}.jsonl.gz") for split in ("train", "test"))
    dressed = [f"Solve this.\n\n{re.sub(r'[.,]', ' ', question)} Think!" for question in test]
    rows = [chat_row(question, "1", "2") for question in [*train, *dressed]]
    evaluation = f"{shared_data}/gsm8k_test.jsonl.gz,{shared_data}/truthfulqa.csv.gz"
    shards = run(write(tmp_path / "r.jsonl", rows), tmp_path / "p", decontaminate=evaluation)
    numbers = [row for row, reason in dropped(shards) if reason == "contaminated"]
    assert [row for row in numbers if row > len(train)] == list(
        range(len(train) + 1, len(rows) + 1)
    )
    # 5 of 7,473: four copies of a test question with other numbers, and a proverb.
    assert len(numbers) - len(test) == 5
    source = shared_data / "hh_harmless_test.jsonl.gz"
    dialogues = run(source, tmp_path / "hh", decontaminate=evaluation)
    assert dialogues.manifest["left_out"] == {}
