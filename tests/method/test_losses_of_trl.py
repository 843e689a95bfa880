"""Every loss is TRL's: `DPOTrainer._compute_loss` itself on random log-probs, and its gradients."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mrpo.method.grammar import parse_method
from mrpo.method.loss_functions import LOSS_TYPES, PER_TOKEN
from mrpo.method.objective import ReferenceLogps
from mrpo.tests.needs import needed

PROMPT, LENGTH, BETA = 2, 9, 0.3
SMOOTHED = {"robust": 0.2, "exo_pair": 0.2}
# In TRL `sigmoid` and `sigmoid_norm` take no label smoothing; in both programs 0 is the default.
CASES = [{"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0)} for name in LOSS_TYPES]
CASES += [
    {"loss_type": name, "f_divergence_type": kind, "label_smoothing": SMOOTHED.get(name, 0.0)}
    for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    for name in ("sigmoid", "hinge", "discopop", "robust", "exo_pair")
]
CASES += [
    {"loss_type": "sigmoid,bco_pair,sft", "loss_weights": (0.8, 0.2, 1.0)},
    {"loss_type": "sigmoid,hinge", "f_divergence_type": "js_divergence"},
    {"loss_type": "robust,apo_zero", "loss_weights": (0.5, 2.0), "label_smoothing": 0.1},
]


@pytest.fixture(scope="module")
def trainer() -> Any:
    return needed("trl").DPOTrainer


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_values_and_gradients_are_those_of_trl(trainer: Any, options: dict[str, Any]) -> None:
    # TRL's sft is a mean over all tokens of a batch, ours over those of a pair: the same for one.
    for seed in range(5):
        pairs = 1 if "sft" in options["loss_type"] else 4
        # TRL's alpha-divergence has no float64.
        exact = options.get("f_divergence_type") != "alpha_divergence"
        batch = random_batch(pairs, seed, torch.float64 if exact else torch.float32)
        theirs, their_slopes = loss_in_trl(trainer, options, batch)
        ours, our_slopes = loss_here(options, batch)
        assert ours == pytest.approx(theirs, abs=1e-7 if exact else 1e-6)
        torch.testing.assert_close(
            our_slopes, their_slopes, rtol=1e-6, atol=1e-7 if exact else 1e-6
        )


def random_batch(pairs: int, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Token log-probs of responses of several lengths, chosen ones first, and their references'."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LENGTH - PROMPT + 1, (2 * pairs,), generator=generator)
    places = torch.arange(LENGTH)
    mask = (places >= PROMPT) & (places < PROMPT + lengths[:, None])
    logps = -3 * torch.rand(2 * pairs, LENGTH - 1, generator=generator, dtype=dtype)
    noise = torch.randn(2 * pairs, generator=generator, dtype=dtype)
    logps = logps * mask[:, 1:]
    return {"mask": mask.long(), "logps": logps, "references": logps.sum(1) + noise}


def loss_in_trl(
    trainer: Any, options: dict[str, Any], batch: dict[str, torch.Tensor]
) -> tuple[float, torch.Tensor]:
    logps = batch["logps"].clone().requires_grad_()
    names = options["loss_type"].split(",")
    nothing = torch.zeros_like(batch["logps"])
    outputs = SimpleNamespace(
        log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda values: values, gather_for_metrics=lambda values: values
    )

    class Model:
        training = True

        def __call__(self, **inputs: Any) -> Any:
            return outputs

    owner = SimpleNamespace(
        model=Model(),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=0.5,
        loss_types=names,
        loss_weights=options.get("loss_weights", (1.0,) * len(names)),
        beta=BETA,
        label_smoothing=options.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = batch["references"].chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(batch["mask"]),
        "attention_mask": torch.ones_like(batch["mask"]),
        "completion_mask": batch["mask"],
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trainer._compute_loss(owner, owner.model, inputs, False)
    loss.backward()
    assert logps.grad is not None
    return loss.item(), logps.grad * batch["mask"][:, 1:]


def loss_here(
    options: dict[str, Any], batch: dict[str, torch.Tensor]
) -> tuple[float, torch.Tensor]:
    per_token = set(options["loss_type"].split(",")) & set(PER_TOKEN)
    normalize = "token" if per_token else "none"
    method = parse_method("dpo", ["one"], beta=BETA, normalize=normalize, **options)
    logps = batch["logps"].clone().requires_grad_()
    chosen, rejected = logps.sum(1).chunk(2)
    tokens = batch["mask"].sum(1).chunk(2)
    references = batch["references"].numpy().reshape(2, -1, 1)
    scores = ReferenceLogps(
        ref_chosen_logps=references[0],
        ref_rejected_logps=references[1],
        ref_chosen_tokens=tokens[0].numpy()[:, None],
        ref_rejected_tokens=tokens[1].numpy()[:, None],
        chosen_bytes=np.ones(len(chosen)),
        rejected_bytes=np.ones(len(chosen)),
        prompts=np.arange(len(chosen)),
    )
    loss = method.loss(chosen, rejected, method.targets(scores), *tokens).loss.mean()
    loss.backward()
    assert logps.grad is not None
    return loss.item(), logps.grad * batch["mask"][:, 1:]
