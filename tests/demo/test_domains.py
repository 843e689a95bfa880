"""The demo's questions: every right reply is right, every wrong one wrong, and nothing leaks."""

from __future__ import annotations

import re

import pytest

from mrpo.demo.data import DOMAINS, FACTS, TASKS, TONES, Domain, Example, make_domains

SUM = re.compile(r"(\d+) \+ (\d+) = (\d+) \+ (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def domains() -> dict[str, Domain]:
    return make_domains(seed=0)


def every(domain: Domain) -> list[Example]:
    return domain.asked + domain.told


def test_the_seed_decides_everything(domains: dict[str, Domain]) -> None:
    assert make_domains(seed=0) == domains
    assert make_domains(seed=1) != domains


@pytest.mark.parametrize("name", DOMAINS)
def test_no_prompt_is_asked_twice_and_none_that_is_asked_is_told(
    domains: dict[str, Domain], name: str
) -> None:
    asked = [example.prompt for example in domains[name].asked]
    assert len(set(asked)) == len(asked) >= 1000
    assert not set(asked) & {example.prompt for example in domains[name].told}


@pytest.mark.parametrize("name", DOMAINS)
def test_the_replies_of_a_question_differ(domains: dict[str, Domain], name: str) -> None:
    for example in every(domains[name]):
        assert example.domain == name
        assert example.right != example.wrong


def test_a_fact_is_the_same_however_it_is_asked(domains: dict[str, Domain]) -> None:
    """One truth about each town and fact; wrong replies name another value of the same fact."""
    truth: dict[str, set[str]] = {}
    for example in every(domains["facts"]):
        about, right = example.right.removesuffix(".").split(" is ")
        same, wrong = example.wrong.removesuffix(".").split(" is ")
        _, fact, _, town = about.split()
        assert fact in example.prompt
        assert town in example.prompt
        assert about == same
        assert {right, wrong} <= set(FACTS[fact].split())
        truth.setdefault(about, set()).add(right)
    assert all(len(values) == 1 for values in truth.values())
    assert len(truth) == len(domains["facts"].asked) == 1000


def test_every_sum_is_right_and_every_slip_is_not(domains: dict[str, Domain]) -> None:
    for example in every(domains["arithmetic"]):
        a, b, tens, ones, result = map(int, SUM.fullmatch(example.right).groups())  # type: ignore[union-attr]
        assert example.prompt == f"What is {a} + {b}?"
        assert (tens, ones, result) == (a - a % 10 + b - b % 10, a % 10 + b % 10, a + b)
        *same, slip = map(int, SUM.fullmatch(example.wrong).groups())  # type: ignore[union-attr]
        assert same == [a, b, tens, ones]
        assert abs(slip - result) in {1, 2, 10}


def test_no_sum_is_asked_that_is_told_in_any_order(domains: dict[str, Domain]) -> None:
    def numbers(examples: list[Example]) -> set[frozenset[str]]:
        return {frozenset(re.findall(r"\d+", example.prompt)) for example in examples}

    assert not numbers(domains["arithmetic"].asked) & numbers(domains["arithmetic"].told)


def test_the_right_reply_answers_the_request_in_its_own_tone(domains: dict[str, Domain]) -> None:
    for example in every(domains["style"]):
        tone = next(ask for ask in TONES if example.prompt.startswith(ask.split("{")[0]))
        task = example.prompt.removeprefix(tone.split("{")[0]).split()[0]
        for reply, own in ((example.right, True), (example.wrong, False)):
            opening, way = reply.split(": ")
            assert (f"{opening}:" in TONES[tone]) is own
            assert way == f"{TASKS[task]}."


def test_no_request_is_asked_that_is_told_in_any_tone(domains: dict[str, Domain]) -> None:
    def requests(examples: list[Example]) -> set[str]:
        return {" ".join(example.prompt.split()[-4:]) for example in examples}

    assert not requests(domains["style"].asked) & requests(domains["style"].told)
