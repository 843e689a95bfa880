"""From rows of token ids to log-probs of the responses' tokens: the one forward of both stages.

`SequenceLogps` is also the unit of sharding: FSDP2 gathers the head's weights only inside the
forward of the root module, so the head is used nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import FLEX, SDPA, PackedMasks
from .head import LogitRule, TokenLogps
from .load import causal_lm, default_attention, set_attention
from .packing import Batch


class SequenceLogps(nn.Module):
    """A causal LM (or a PEFT model of one) that maps a `Batch` to token log-probs [R], float32."""

    def __init__(self, model: nn.Module, *, chunk_tokens: int = 256) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        lm = causal_lm(model)
        if lm.config._attn_implementation not in (SDPA, FLEX):
            set_attention(lm, default_attention(lm.device))

    def forward(self, batch: Batch) -> Tensor:
        """Log-probs in nats of the scored tokens, in the batch's order."""
        lm = causal_lm(self.model)
        hidden = self._hidden(lm.get_decoder(), batch).flatten(0, 1)[batch.predict]
        return self._head(lm, hidden, batch.targets)

    def _hidden(self, decoder: nn.Module, batch: Batch) -> Tensor:
        if batch.spans is None:
            # Causal attention never looks at padding on the right, so no mask is needed.
            return decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        # A mask of four dimensions is passed on as it is, so that none is built in vain.
        return decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.input_ids.new_empty(1, 1, 0, 0, dtype=torch.bool),
            packed=PackedMasks(batch),
            use_cache=False,
        ).last_hidden_state

    def _head(self, lm: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        head, rule = lm.get_output_embeddings(), logit_rule(lm)
        if type(head) is nn.Linear:
            return TokenLogps.apply(
                hidden, head.weight, head.bias, targets, rule, self.chunk_tokens
            )

        def logps(rows: Tensor, picks: Tensor) -> Tensor:
            logits = rule.apply_(head(rows).float())
            return logits.gather(-1, picks[:, None])[:, 0] - logits.logsumexp(-1)

        # An adapter on the head has a forward of its own.
        parts = zip(hidden.split(self.chunk_tokens), targets.split(self.chunk_tokens))
        return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])


def logit_rule(lm: nn.Module) -> LogitRule:
    """What the architecture does behind its head, from the config."""
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


def sum_by_sequence(token_logps: Tensor, batch: Batch) -> Tensor:
    """[S] sums of token log-probs, added up in float64; float32 where a gradient is wanted."""
    total = torch.zeros(batch.num_sequences, dtype=torch.float64, device=token_logps.device)
    total = total.index_add(0, batch.sequence, token_logps.double())
    return total.float() if token_logps.requires_grad else total


def split_by_sequence(token_logps: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """The log-probs of each sequence's scored tokens, in text order."""
    return token_logps.split(batch.counts)
