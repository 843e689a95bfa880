"""Doctor catches each fault, injected into real scores of trained references.

The name of a test says which evidence shows the fault: the scores alone, or the probe, which scores
16 pairs again in an independent way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mrpo.evaluation.doctor.doctor import Diagnosis
from mrpo.tests.evaluation.doctor import faulty
from mrpo.tests.evaluation.trained import Clinic

Fault = Callable[[Clinic, str, Path], pa.Table]
PROBE = 16
ALIASES = ("llama", "mistral", "qwen")

SHOWN_BY_SCORES: dict[str, tuple[str, Fault]] = {
    "another tokenizer's ids": (
        "tokens",
        lambda clinic, alias, _: faulty.other_token_ids(clinic, alias, _another(alias)),
    ),
    "responses truncated": ("truncated", lambda clinic, alias, _: faulty.truncated(clinic, alias)),
    "rows shuffled": ("shuffled", lambda clinic, alias, _: faulty.shuffled(clinic.scores[alias])),
    "only log-probs shuffled": (
        "shuffled",
        lambda clinic, alias, _: _logps_alone(clinic.scores[alias], faulty.shuffled),
    ),
    "chosen and rejected swapped": (
        "swapped",
        lambda clinic, alias, _: faulty.swapped(clinic.scores[alias]),
    ),
    "only log-probs swapped": (
        "swapped",
        lambda clinic, alias, _: _logps_alone(clinic.scores[alias], faulty.swapped),
    ),
    "random weights": (
        "uniform",
        lambda clinic, alias, folder: faulty.random_weights(clinic, alias, folder),
    ),
    "means instead of sums": ("means", lambda clinic, alias, _: faulty.means(clinic.scores[alias])),
    "half of the rows copied": (
        "copied",
        lambda clinic, alias, _: faulty.half_copied(
            clinic.scores[alias], clinic.scores[_another(alias)]
        ),
    ),
    "float16 rounding": (
        "rounded",
        lambda clinic, alias, _: faulty.in_float16(clinic.scores[alias]),
    ),
}
SHOWN_BY_PROBE: dict[str, tuple[str, Fault]] = {
    "missing chat template": (
        "no_template",
        lambda clinic, alias, _: faulty.no_template(clinic, alias),
    ),
    "template of another family": (
        "template",
        lambda clinic, alias, _: faulty.template_of(clinic, alias, _another(alias)),
    ),
    "BOS doubled": ("bos", lambda clinic, alias, _: faulty.doubled_bos(clinic, alias)),
    "left-padding slices": ("padding", lambda clinic, alias, _: faulty.left_padded(clinic, alias)),
    "log-probs in base 2": ("base", lambda clinic, alias, _: faulty.base_two(clinic.scores[alias])),
}


def _logps_alone(scores: pa.Table, fault: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """A fault of whole rows, in the columns of log-probs alone."""
    broken = fault(scores)
    return faulty.with_columns(scores, {name: broken[name] for name in faulty.LOGPS})


def _another(alias: str) -> str:
    return ALIASES[(ALIASES.index(alias) + 1) % 3]


def only_broken(diagnosis: Diagnosis) -> str:
    """The one reference whose verdict is broken; the others are healthy."""
    states = {verdict.alias: verdict.state for verdict in diagnosis.verdicts}
    broken = [alias for alias, state in states.items() if state == "broken"]
    assert len(broken) == 1, diagnosis.verdicts
    assert all(state == "healthy" for alias, state in states.items() if alias != broken[0])
    return broken[0]


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("fault", SHOWN_BY_SCORES)
def test_scores_alone_show(fault: str, alias: str, clinic: Clinic, tmp_path: Path) -> None:
    code, inject = SHOWN_BY_SCORES[fault]
    store = clinic.store(tmp_path / "store", **{alias: inject(clinic, alias, tmp_path / "model")})
    diagnosis = clinic.diagnose(store)
    assert only_broken(diagnosis) == alias
    (finding,) = diagnosis.findings[alias]
    assert (finding.level, finding.code, finding.shown_by) == ("fault", code, "scores")


@pytest.mark.parametrize("fault", SHOWN_BY_PROBE)
def test_the_probe_shows(fault: str, clinic: Clinic, tmp_path: Path) -> None:
    code, inject = SHOWN_BY_PROBE[fault]
    alias = "mistral"
    store = clinic.store(tmp_path / "store", **{alias: inject(clinic, alias, tmp_path / "model")})
    diagnosis = clinic.diagnose(store, probe=PROBE)
    assert only_broken(diagnosis) == alias
    findings = diagnosis.findings[alias]
    (finding,) = [finding for finding in findings if finding.shown_by == "probe"]
    assert (finding.level, finding.code) == ("fault", code)
    (verdict,) = [verdict for verdict in diagnosis.verdicts if verdict.alias == alias]
    assert finding.cause in verdict.reason  # the probe's cause comes before that of the scores
