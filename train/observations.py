"""Signs of trouble in the log of a finished run, each as a sentence with what to try.

They are rules of thumb over figures that the log has anyway; none stops a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

Line = Mapping[str, float | None]  # None: a value that is not finite
Known = Mapping[str, float]

FALL = 1.0  # nats by which a chosen response has to become less likely
LEARNED, BEHIND = 0.995, 0.1  # accuracy on training pairs; how far held-out pairs are below it
MEANT = ("base", "fixed")  # the weighting of dpo:x+reliable, and the user's own weights
ALONE = 0.95  # of the weight, or share of the others' responses that clipping moved


def observations(lines: Sequence[Line], weighting: str) -> list[str]:
    """Sentences on the lines of a log, `log.jsonl`; mostly none.

    `weighting`: the method's. Weights that are meant to be on one reference are no surprise.
    """
    known = [{name: value for name, value in line.items() if value is not None} for line in lines]
    training = [line for line in known if "rewards/accuracies" in line]
    held_out = [line for line in known if "eval_rewards/accuracies" in line]
    found = [displacement(held_out), over_fitting(training, held_out)]
    if weighting not in MEANT:
        found.append(one_reference(training))
    return [sentence for sentence in found if sentence]


def displacement(held_out: Sequence[Known]) -> str:
    """Both responses became less likely (Razin et al., arXiv 2410.08847), on the same pairs."""
    if len(held_out) < 2:
        return ""
    first, last = held_out[0], held_out[-1]
    both = ("eval_logps/chosen", "eval_logps/rejected")
    if any(name not in line for name in both for line in (first, last)):
        return ""
    chosen, rejected = (last[name] - first[name] for name in both)
    if chosen > -FALL or rejected > -FALL:
        return ""
    return (
        f"from step {first['step']:,} to {last['step']:,} the held-out chosen responses became "
        f"less likely, by {-chosen:.1f} nats, as the rejected did, by {-rejected:.1f} (likelihood "
        "displacement); try --sft-weight 0.1, or a lower --learning-rate"
    )


def over_fitting(training: Sequence[Known], held_out: Sequence[Known]) -> str:
    """The last quarter of the training pairs all right, and held-out pairs far less so."""
    if not training or not held_out:
        return ""
    last = training[-max(1, len(training) // 4) :]
    seen = fmean(line["rewards/accuracies"] for line in last)
    unseen = held_out[-1]["eval_rewards/accuracies"]
    if seen < LEARNED or unseen > seen - BEHIND:
        return ""
    return (
        f"accuracy is {seen:.1%} on training pairs and {unseen:.1%} on held-out ones (over-fitting)"
        "; try fewer epochs, a lower --learning-rate, or more pairs"
    )


def one_reference(training: Sequence[Known]) -> str:
    """Of several references one has nearly all the weight, or clipping holds all others back."""
    if not training:
        return ""
    means = {
        name: fmean(line[name] for line in training if name in line)
        for name in training[-1]
        if name.startswith("refs/")
    }
    weights = {name.rpartition("/")[2]: w for name, w in means.items() if "/weight/" in name}
    clipped = [share for name, share in means.items() if "/clipped/" in name]
    if len(weights) < 2:
        return ""
    alias, weight = max(weights.items(), key=lambda item: item[1])
    if weight >= ALONE:
        return (
            f"{alias} has {weight:.0%} of the weight, so this is nearly DPO with {alias}; "
            "`mrpo doctor` says what would let the others matter"
        )
    if clipped and min(clipped) >= ALONE:
        return (
            f"clipping moved {min(clipped):.0%} of every other reference's responses, so this is "
            "nearly DPO with the base; raise --epsilon, or ask `mrpo doctor`"
        )
    return ""
