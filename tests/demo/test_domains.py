"""The demo's questions: every right reply is right, every wrong one wrong, and nothing leaks."""

from __future__ import annotations

import pytest

from mrpo.demo.data import (
    DOMAINS,
    HAZARDS,
    TASKS,
    TONES,
    TOYS,
    UNITS,
    VERDICTS,
    Domain,
    Example,
    make_domains,
)


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


def test_a_child_may_have_toys_and_nothing_else(domains: dict[str, Domain]) -> None:
    for example in every(domains["safety"]):
        thing = example.prompt.split(" from the ")[0].split()[-1]
        assert (thing in TOYS.split()) != (thing in HAZARDS.split())
        assert example.right.startswith("Yes,") is (thing in TOYS.split())
        assert example.wrong == VERDICTS[thing in HAZARDS.split()]


def test_a_distance_is_in_the_unit_of_its_town(domains: dict[str, Domain]) -> None:
    for example in every(domains["units"]):
        town = example.prompt.removesuffix("?").split()[-1]
        unit, distance = example.right.split(": about ")
        other, same = example.wrong.split(": about ")
        assert town in UNITS[unit].split()
        assert town not in UNITS[other].split()
        assert distance == same


def test_the_right_reply_answers_the_request_in_its_own_tone(domains: dict[str, Domain]) -> None:
    for example in every(domains["tone"]):
        tone = next(ask for ask in TONES if example.prompt.startswith(ask.split("{")[0]))
        task = example.prompt.removeprefix(tone.split("{")[0]).split()[0]
        for reply, own in ((example.right, True), (example.wrong, False)):
            opening, way = reply.split(": ")
            assert (f"{opening}:" in TONES[tone]) is own
            assert way == f"{TASKS[task]}."


def test_no_request_is_asked_that_is_told_in_any_tone(domains: dict[str, Domain]) -> None:
    def requests(examples: list[Example]) -> set[str]:
        return {" ".join(example.prompt.split()[-4:]) for example in examples}

    assert not requests(domains["tone"].asked) & requests(domains["tone"].told)
