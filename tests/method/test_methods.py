"""The grammar of methods, and a `Method` against the public functions it is made of."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import mrpo
from mrpo import (
    arwc_weights,
    ctro_clip,
    max_margin_weights,
    multi_dpo_loss,
    preference_loss,
    virtual_reference,
)
from mrpo.errors import UserError
from mrpo.method import losses
from mrpo.method.fitted import fit_weights
from mrpo.method.grammar import named_references, parse_method
from mrpo.method.losses import sft_loss
from mrpo.method.objective import Method, ReferenceLogps, ReferenceTargets
from mrpo.method.weightings import vaw_weights, vdw_weights

ALIASES = ["llama", "mistral", "qwen"]


def make_scores(n: int = 40, k: int = 3, seed: int = 0) -> ReferenceLogps:
    rng = np.random.default_rng(seed)
    logps = -rng.uniform(5, 200, (2, n, k))
    tokens = rng.integers(5, 60, (2, n, k))
    sizes = rng.integers(20, 300, (2, n))
    return ReferenceLogps(
        ref_chosen_logps=logps[0],
        ref_rejected_logps=logps[1],
        ref_chosen_tokens=tokens[0],
        ref_rejected_tokens=tokens[1],
        chosen_bytes=sizes[0],
        rejected_bytes=sizes[1],
        prompts=np.arange(n) // 2,
    )


def policy(n: int = 40, seed: int = 1) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    rng = np.random.default_rng(seed)
    logps = [torch.tensor(-rng.uniform(5, 200, n), dtype=torch.float32) for _ in range(2)]
    return logps, [torch.from_numpy(rng.integers(5, 60, n)) for _ in range(2)]


def loss_of(method: Method, scores: ReferenceLogps, held_out: bool = False) -> np.ndarray:
    logps, tokens = policy(len(scores))
    return method.loss(*logps, method.targets(scores, held_out), *tokens).loss.numpy()


def describe(method: Method) -> tuple[Any, ...]:
    return method.references, method.columns, method.kind, method.weighting, method.epsilon


GRAMMAR = {
    "mrpo": (tuple(ALIASES), (0, 1, 2), "harmonic", "arwc", 0.1),
    "mrpo:qwen/llama": (("qwen", "llama"), (2, 0), "harmonic", "arwc", 0.1),
    "mrpo:qwen/llama+fitted": (("qwen", "llama"), (2, 0), "harmonic", "fitted", 0.1),
    "mrpo+max-margin": (tuple(ALIASES), (0, 1, 2), "harmonic", "max-margin", 0.1),
    "multi-dpo": (tuple(ALIASES), (0, 1, 2), "separate", "uniform", None),
    "multi-dpo+vdw": (tuple(ALIASES), (0, 1, 2), "separate", "vdw", None),
    "geometric": (tuple(ALIASES), (0, 1, 2), "geometric", "uniform", None),
    "arithmetic:mistral/qwen+vaw": (("mistral", "qwen"), (1, 2), "arithmetic", "vaw", None),
    "harmonic": (tuple(ALIASES), (0, 1, 2), "harmonic", "uniform", None),
    "dpo": (("llama",), (0,), "harmonic", "uniform", None),
    "dpo:qwen": (("qwen",), (2,), "harmonic", "uniform", None),
}


@pytest.mark.parametrize("text", GRAMMAR)
def test_a_method_is_read_from_one_line(text: str) -> None:
    method = parse_method(text, ALIASES)
    assert describe(method) == GRAMMAR[text]
    assert describe(parse_method(str(method), ALIASES)) == GRAMMAR[text]


def test_flags_override_the_parts_of_the_text() -> None:
    method = parse_method(
        "mrpo+uniform", ALIASES, reference_kind="geometric", weighting="arwc", epsilon="none"
    )
    assert describe(method) == (tuple(ALIASES), (0, 1, 2), "geometric", "arwc", None)
    assert parse_method("geometric", ALIASES, epsilon=0.3).epsilon == 0.3
    assert parse_method("mrpo", ALIASES, epsilon=0).epsilon == 0
    fixed = parse_method("mrpo", ALIASES, weights="1,1,2")
    assert (fixed.weighting, fixed.weights) == ("fixed", (0.25, 0.25, 0.5))
    assert parse_method("mrpo+fixed", ALIASES, weights="1, 1, 2").weights == fixed.weights


def test_the_references_of_a_text_are_known_before_the_aliases() -> None:
    assert named_references("dpo:llama@0f3a") == ("llama@0f3a",)
    assert named_references("multi-dpo+vdw") == ()


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("orpo", {}, "method 'orpo': 'orpo' is unknown; choose one of mrpo, multi-dpo, dpo"),
    ("mrpo:", {}, "method 'mrpo:' is incomplete; the form is METHOD[:ref/ref…][+weighting]"),
    ("mrpo:llama/", {}, "is incomplete"),
    ("mrpo+", {}, "is incomplete"),
    ("mrpo:gemma", {}, "reference 'gemma' is not among llama, mistral, qwen; add it to --refs"),
    ("mrpo:llama/llama", {}, "names a reference twice"),
    ("dpo:llama/qwen", {}, "dpo takes one reference; use mrpo or multi-dpo for more"),
    ("mrpo+equal", {}, "weighting 'equal' is unknown; choose one of uniform, arwc, max-margin"),
    ("mrpo+fixed", {}, "weighting fixed needs --weights, for example"),
    ("mrpo", {"weights": "1,2"}, "has 3 references (llama, mistral, qwen) and --weights 2 numbers"),
    ("mrpo", {"weights": "1,x,2"}, "--weights 1,x,2: not numbers"),
    ("mrpo", {"weights": "0,0,0"}, "must be numbers of 0 or more, not all 0"),
    ("mrpo+arwc", {"weights": "1,1,1", "weighting": "arwc"}, "does not go with weighting arwc"),
    (
        "mrpo",
        {"epsilon": float("inf")},
        "epsilon is inf; it must be a number of 0 or more, or none",
    ),
    ("mrpo", {"epsilon": -1.0}, "epsilon is -1.0"),
    ("mrpo", {"reference_kind": "mean"}, "reference kind 'mean' is unknown"),
    ("multi-dpo", {"reference_kind": "geometric"}, "averages losses and has no reference kind"),
    ("mrpo", {"normalize": "char"}, "normalization 'char' is unknown"),
    ("mrpo", {"beta": 0.0}, "beta is 0.0; it must be a positive number"),
    ("mrpo", {"sft_weight": -1.0}, "the SFT term has the weight -1.0; it must be 0 or more"),
    ("mrpo", {"loss_type": "kto"}, "loss type 'kto' is unknown"),
    ("mrpo", {"loss_type": "sigmoid,kto"}, "loss type 'kto' is unknown"),
    ("mrpo", {"loss_type": "sigmoid,sigmoid"}, "names sigmoid twice"),
    ("mrpo", {"loss_type": "sft"}, "sft alone compares no responses"),
    ("mrpo", {"loss_type": "sigmoid,sft", "sft_weight": 1.0}, "sft has a weight of its own"),
    ("mrpo", {"loss_type": "sigmoid,sft", "loss_weights": (1.0,)}, "1 loss weights for"),
    ("mrpo", {"loss_type": "sigmoid,sft", "loss_weights": (1.0, -1.0)}, "has the weight -1.0"),
    ("mrpo", {"loss_type": "exo_pair"}, "infinite without label smoothing"),
    ("mrpo", {"loss_type": "nca_pair,hinge", "label_smoothing": 0.1}, "does not go with loss"),
    ("mrpo", {"loss_type": "sigmoid_norm"}, "loss type sigmoid_norm works on log-probs per token"),
    ("mrpo", {"f_divergence_type": "renyi"}, "f-divergence type 'renyi' is unknown"),
    (
        "mrpo",
        {"f_divergence_type": "js_divergence", "loss_type": "sigmoid,bco_pair"},
        "has no effect on loss type bco_pair",
    ),
    ("mrpo", {"f_divergence_type": "forward_kl", "normalize": "byte"}, "leave out --normalize"),
    ("mrpo", {"loss_type": "ipo"}, "loss type ipo works on log-probs per token"),
    ("mrpo", {"loss_type": "ipo", "normalize": "byte"}, "add --normalize token"),
    ("mrpo", {"label_smoothing": 0.7}, "label smoothing is 0.7"),
]


@pytest.mark.parametrize(("text", "flags", "message"), MISTAKES)
def test_a_mistake_is_one_line_with_the_way_out(
    text: str, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_method(text, ALIASES, **flags)
    assert "\n" not in str(error.value)


def test_no_alias_at_all_is_a_mistake_too() -> None:
    with pytest.raises(UserError, match="has no reference; give at least one with --refs"):
        parse_method("mrpo", [])


def test_mrpo_is_arwc_on_raw_scores_then_clipping_then_the_harmonic_mean() -> None:
    scores = make_scores()
    logps, _ = policy()
    raw = scores.ref_chosen_logps, scores.ref_rejected_logps
    alpha = arwc_weights(*raw)
    virtual = [virtual_reference(r, alpha) for r in ctro_clip(*raw, 0.1)]
    expected = preference_loss(*(p.numpy() for p in logps), *virtual, beta=0.1)
    np.testing.assert_allclose(loss_of(parse_method("mrpo", ALIASES), scores), expected, rtol=1e-5)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("kind", ["harmonic", "geometric", "arithmetic"])
@pytest.mark.parametrize("weighting", ["uniform", "max-margin", "vdw", "vaw", "fitted", "fixed"])
def test_every_kind_and_weighting_is_what_the_public_functions_give(
    kind: str, weighting: str, adaptive: bool
) -> None:
    training, held_out, batch = make_scores(60, seed=1), make_scores(30, seed=2), make_scores()
    raw = batch.ref_chosen_logps, batch.ref_rejected_logps
    validation = held_out.ref_chosen_logps, held_out.ref_rejected_logps
    fit = fit_weights(training.ref_chosen_logps - training.ref_rejected_logps, training.prompts)
    alpha = {
        "uniform": np.ones(3) / 3,
        "max-margin": max_margin_weights(*raw),
        "vdw": vdw_weights(*validation),
        "vaw": vaw_weights(*validation),
        "fitted": fit.weights,
        "fixed": np.array([0.5, 0.0, 0.5]),
    }[weighting]
    flags = {"weights": "1,0,1"} if weighting == "fixed" else {}
    method = parse_method(
        f"{kind}+{weighting}", ALIASES, epsilon=0.2, adaptive_epsilon=adaptive, **flags
    ).prepare(training, held_out, bootstrap=0)
    targets = method.targets(batch, held_out=True)
    clipped = ctro_clip(*raw, 0.2, adaptive)
    for got, logps in zip((targets.virtual_chosen_logps, targets.virtual_rejected_logps), clipped):
        np.testing.assert_allclose(got, virtual_reference(logps, alpha, kind), rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "name"), [("mrpo", "preference_loss"), ("multi-dpo", "multi_dpo_loss")]
)
def test_training_calls_the_loss_that_the_package_offers(
    monkeypatch: pytest.MonkeyPatch, text: str, name: str
) -> None:
    function = getattr(mrpo, name)
    assert getattr(losses, name) is function
    monkeypatch.setattr(losses, name, lambda *args: 2 * function(*args))
    scores, method = make_scores(), parse_method(text, ALIASES)
    doubled = loss_of(method, scores)
    monkeypatch.undo()
    np.testing.assert_array_equal(doubled, 2 * loss_of(method, scores))


def test_multi_dpo_is_the_public_function() -> None:
    scores = make_scores()
    logps, tokens = policy()
    for text in ("multi-dpo", "multi-dpo+arwc"):
        method = parse_method(text, ALIASES, beta=0.2)
        targets = method.targets(scores)
        refs = scores.ref_chosen_logps, scores.ref_rejected_logps
        alpha = arwc_weights(*refs) if "arwc" in text else [1, 1, 1]
        expected = multi_dpo_loss(*(p.numpy() for p in logps), *refs, np.asarray(alpha), beta=0.2)
        result = method.loss(*logps, targets, *tokens)
        np.testing.assert_allclose(result.loss.numpy(), expected, rtol=1e-5)
        margins = ((refs[0] - refs[1]) * targets.weights.numpy()).sum(1)
        rewards = result.chosen_rewards - result.rejected_rewards
        mean = 0.2 * ((logps[0] - logps[1]).numpy() - margins)
        np.testing.assert_allclose(rewards.numpy(), mean, atol=1e-4)


@pytest.mark.parametrize("text", ["dpo:mistral", "mrpo:mistral", "geometric:mistral+max-margin"])
def test_one_reference_is_dpo_with_it_whatever_the_method(text: str) -> None:
    scores = make_scores()
    logps, _ = policy()
    refs = scores.ref_chosen_logps[:, 1], scores.ref_rejected_logps[:, 1]
    expected = preference_loss(*(p.numpy() for p in logps), *refs, beta=0.1)
    np.testing.assert_allclose(loss_of(parse_method(text, ALIASES), scores), expected, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["token", "byte"])
def test_normalizing_comes_before_weights_and_clipping_and_is_done_to_the_policy_too(
    normalize: str,
) -> None:
    scores = make_scores()
    logps, tokens = policy()
    sizes = scores.chosen_bytes, scores.rejected_bytes
    ref_tokens = scores.ref_chosen_tokens, scores.ref_rejected_tokens
    raw = scores.ref_chosen_logps, scores.ref_rejected_logps
    if normalize == "byte":
        refs = [r / size[:, None] for r, size in zip(raw, sizes)]
        mine = [p.numpy() / size for p, size in zip(logps, sizes)]
    else:
        refs = [r / count for r, count in zip(raw, ref_tokens)]
        mine = [p.numpy() / count.numpy() for p, count in zip(logps, tokens)]
    alpha = arwc_weights(*refs)
    virtual = [virtual_reference(r, alpha) for r in ctro_clip(*refs, 0.1)]
    method = parse_method("mrpo", ALIASES, normalize=normalize, beta=2.5)
    expected = preference_loss(*mine, *virtual, beta=2.5)
    np.testing.assert_allclose(loss_of(method, scores), expected, rtol=1e-4)


def test_the_sft_term_is_added_to_any_loss() -> None:
    scores = make_scores()
    logps, tokens = policy()
    for text in ("mrpo", "multi-dpo"):
        plain, more = (parse_method(text, ALIASES, sft_weight=weight) for weight in (0.0, 0.5))
        added = loss_of(more, scores) - loss_of(plain, scores)
        np.testing.assert_allclose(added, 0.5 * sft_loss(logps[0], tokens[0]).numpy(), atol=1e-4)


def test_training_pairs_get_the_weights_of_their_fold_and_held_out_ones_the_full_fit() -> None:
    scores = make_scores(60)
    method = parse_method("geometric+fitted", ALIASES).prepare(scores, make_scores(5), bootstrap=0)
    assert method.fitted is not None
    assert scores.prompts is not None
    np.testing.assert_array_equal(
        method.targets(scores).weights, method.fitted.for_prompts(scores.prompts)
    )
    full = np.tile(method.fitted.weights, (60, 1))
    np.testing.assert_array_equal(method.targets(scores, held_out=True).weights, full)


@pytest.mark.parametrize("weighting", ["vdw", "vaw"])
def test_weights_from_held_out_pairs_need_some(weighting: str) -> None:
    with pytest.raises(UserError, match="needs held-out pairs and there are none; prepare"):
        parse_method(f"mrpo+{weighting}", ALIASES).prepare(make_scores(), make_scores(0))


@pytest.mark.parametrize("text", ["mrpo", "multi-dpo", "geometric+fitted", "mrpo+max-margin"])
def test_a_missing_reference_drops_out_of_its_pair_and_a_missing_base_drops_the_pair(
    text: str,
) -> None:
    scores = make_scores()
    scores.ref_chosen_logps[3, 1] = np.nan  # the rejected score is there, and must not count
    scores.ref_rejected_logps[5, 0] = np.nan
    method = parse_method(text, ALIASES).prepare(make_scores(60), make_scores(), bootstrap=0)
    usable = method.usable(scores)
    assert np.flatnonzero(~usable).tolist() == [5]
    targets = method.targets(scores)
    assert targets.weights[3, 1] == 0
    assert targets.weights[3].sum() == pytest.approx(1)
    assert targets.clipped[3, 1].isnan()
    loss = loss_of(method, scores)
    assert np.isnan(loss[5])
    assert np.isfinite(loss[usable]).all()


def test_a_pair_whose_weights_are_all_on_missing_references_is_not_usable() -> None:
    scores = make_scores()
    scores.ref_chosen_logps[2, 1:] = np.nan
    method = parse_method("mrpo", ALIASES, weights="0,1,1")
    assert np.flatnonzero(~method.usable(scores)).tolist() == [2]


def test_the_clipped_share_counts_both_responses() -> None:
    """Base −100 / −100, eps 0.1 for both: one reference is inside, one half out, one out."""
    scores = make_scores(1)
    scores.ref_chosen_logps[0] = [-100, -95, -150]
    scores.ref_rejected_logps[0] = [-100, -150, -50]
    clipped = parse_method("mrpo", ALIASES, adaptive_epsilon=False).targets(scores).clipped
    assert clipped.tolist() == [[0.0, 0.5, 1.0]]
    assert parse_method("harmonic", ALIASES).targets(scores).clipped.tolist() == [[0, 0, 0]]


def test_rewards_are_beta_times_the_log_ratio_and_carry_no_gradient() -> None:
    scores = make_scores()
    logps, tokens = policy()
    logps[0].requires_grad_()
    method = parse_method("mrpo", ALIASES, beta=0.3)
    targets = method.targets(scores)
    result = method.loss(*logps, targets, *tokens)
    expected = 0.3 * (logps[0].detach() - targets.virtual_chosen_logps).numpy()
    np.testing.assert_allclose(result.chosen_rewards.numpy(), expected, rtol=1e-5)
    assert result.loss.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_all_that_a_step_needs_is_in_the_targets() -> None:
    """Targets of a batch are the rows of the targets of all pairs: nothing depends on the batch."""
    scores = make_scores()
    method = parse_method("mrpo", ALIASES)
    everything = method.targets(scores)
    rows = np.array([7, 3])
    fields = ReferenceLogps.__dataclass_fields__
    part = ReferenceLogps(**{name: getattr(scores, name)[rows] for name in fields})
    batch = method.targets(part)
    for name in ReferenceTargets.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(batch, name), getattr(everything, name)[rows])
