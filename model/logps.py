"""From rows of token ids to log-probs of the responses' tokens: the forward of both stages.

`SequenceLogps` is also the unit of sharding: FSDP2 gathers the head's weights only inside the
forward of the root module, so the head is used nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import UserError
from .attention import FLEX, SDPA, PackedMasks, padded_length
from .head import KEEP_BYTES, LogitRule, chunk_rows, token_logps
from .load import (
    balancing_coefficient,
    default_attention,
    layer_windows,
    packs,
    rope_limit,
    set_attention,
)
from .packing import (
    PADDING,
    Batch,
    pack,
    packed_tokens,
    padded_tokens,
    plan_padded,
    plan_rows,
    unpacked,
)

if TYPE_CHECKING:
    from ..data.rendering import RenderedPrompt

logger = logging.getLogger(__name__)


class Routing(NamedTuple):
    """Where an MoE model's routers send tokens: sums over the tokens of all layers.

    A token counts as often as it would with one response a row: that of a shared prompt once for
    each of its responses. Padding does not count.
    """

    assigned: Tensor  # [E], how often an expert was among those chosen; no gradient
    probability: Tensor  # [E], of the routers' softmax
    tokens: Tensor  # [], times layers

    def sizes(self) -> Tensor:
        """`assigned` and `tokens` in one vector, [E + 1]."""
        return torch.cat([self.assigned, self.tokens[None]])


def balancing_loss(routing: Routing, sizes: Tensor) -> Tensor:
    """The load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6).

        E * sum_e (assigned_e / tokens) * (probability_e / tokens)

    `sizes` [E + 1] are those of the whole batch, of which `routing` may be a part: the parts'
    losses then add up to the batch's.
    """
    assigned, tokens = sizes[:-1], sizes[-1]
    return len(assigned) * (assigned * routing.probability).sum() / tokens.square()


class SequenceLogps(nn.Module):
    """A causal LM (or a PEFT model of one) that maps a `Batch` to token log-probs [R], float32.

    In training mode an MoE model with a balancing loss leaves its last forward in `routing`.

    Logits of `chunk_tokens` tokens exist at a time (by default as many as `chunk_rows` says), and
    at most `keep_bytes` of their slopes between forward and backward.
    """

    def __init__(
        self, model: nn.Module, *, chunk_tokens: int | None = None, keep_bytes: int = KEEP_BYTES
    ) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.keep_bytes = keep_bytes
        self.packs = packs(self.lm.config)
        self.rope_limit = rope_limit(self.lm.config)
        self.balancing = balancing_coefficient(self.lm.config)
        self.routing: Routing | None = None
        # For an architecture that the tests do not cover, the head is checked once.
        self._head_is_known = self.packs and self.lm.config.get_text_config() is self.lm.config
        if self.lm.config._attn_implementation not in (SDPA, FLEX):
            set_attention(self.lm, default_attention(self.lm.device))
        if not self.packs:
            logger.warning(
                "%s is not on the list to pack: one response a row, prompts computed twice",
                self.lm.config.get_text_config().model_type,
            )

    @property
    def lm(self) -> PreTrainedModel:
        """The causal LM itself, without a PEFT wrapper."""
        wrapper: Any = self.model
        return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The blocks of the decoder, which FSDP2 may shard separately."""
        count = self.lm.config.get_text_config().num_hidden_layers
        modules = self.lm.get_decoder().modules()
        return next(m for m in modules if isinstance(m, nn.ModuleList) and len(m) == count)

    def tokens(self, prompt: RenderedPrompt) -> int:
        """Tokens that the decoder computes for a prompt and its responses."""
        if self.packs and not self._beyond_rope_limit(prompt):
            return packed_tokens(prompt)
        return len(prompt.responses) * padded_tokens(prompt)

    def parts(self, prompt: RenderedPrompt, max_tokens: int) -> list[range]:
        """The numbers of a prompt's responses in parts of at most `max_tokens` tokens each, the
        prompt repeated in each; a response beyond the budget is alone."""
        first, parts = 0, []
        for number in range(1, len(prompt.responses)):
            if self.tokens(prompt.only(range(first, number + 1))) > max_tokens:
                parts.append(range(first, number))
                first = number
        return [*parts, range(first, len(prompt.responses))]

    def plan(self, prompts: Sequence[RenderedPrompt], max_tokens: int) -> list[list[int]]:
        """The indices of the prompts in each forward, at most `max_tokens` tokens at a time."""
        alone: list[int] = []
        together: list[int] = []
        for index, prompt in enumerate(prompts):
            (alone if self._beyond_rope_limit(prompt) else together).append(index)
        plan = plan_rows if self.packs else plan_padded
        rows = plan([prompts[i] for i in together], max_tokens)
        return [[i] for i in alone] + [[together[i] for i in row] for row in rows]

    def collate(
        self,
        prompts: Sequence[RenderedPrompt],
        device: torch.device | str,
        copies: Sequence[int] | None = None,
    ) -> Batch:
        """The prompts as a batch, packed where the architecture allows it; `copies` as `pack`."""
        if not self.packs or any(map(self._beyond_rope_limit, prompts)):
            return unpacked(prompts, device, copies=copies)
        flex = self.lm.config._attn_implementation == FLEX
        return pack(prompts, device, length=padded_length if flex else None, copies=copies)

    def forward(self, batch: Batch) -> Tensor:
        """Log-probs in nats of the scored tokens, in the batch's order."""
        if not self._head_is_known:
            check_head(self.lm, batch.input_ids[:1, :8])
            self._head_is_known = True
        hidden = self._hidden(batch).flatten(0, 1).index_select(0, batch.predict)
        head, rule = self.lm.get_output_embeddings(), logit_rule(self.lm)
        vocabulary = self.lm.config.get_text_config().vocab_size
        chunk = self.chunk_tokens or chunk_rows(vocabulary, hidden.device)
        if type(head) is not nn.Linear:
            return _through_module(head, hidden, batch.targets, rule, chunk)
        return token_logps(
            hidden,
            head.weight,
            head.bias,
            batch.targets,
            rule,
            chunk=chunk,
            keep_bytes=self.keep_bytes if torch.is_grad_enabled() else 0,
        )

    def _hidden(self, batch: Batch) -> Tensor:
        """The decoder's last hidden states [B, L, D]."""
        self.routing = None
        if self.rope_limit is not None:
            _forget_longest(self.lm.get_decoder())
        weight = batch.copies.float()
        if batch.bounds is None and self.rope_limit and batch.input_ids.shape[1] > self.rope_limit:
            return self._row_by_row(batch, weight)
        if batch.bounds is None:
            # Causal attention never looks at padding on the right, so no mask is needed.
            return self._decode(weight, input_ids=batch.input_ids)
        flex = self.lm.config._attn_implementation == FLEX
        masks = PackedMasks(batch, layer_windows(self.lm.config) if flex else ())
        # A mask of four dimensions is passed through, so that transformers builds none.
        return self._decode(
            weight,
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.input_ids.new_empty(1, 1, 0, 0, dtype=torch.bool),
            packed=masks,
        )

    def _row_by_row(self, batch: Batch, weight: Tensor) -> Tensor:
        """Hidden states of rows computed one at a time, without their padding."""
        width, rows = batch.input_ids.shape[1], []
        for ids, prompt, row_weight in zip(batch.input_ids, batch.prompt, weight):
            _forget_longest(self.lm.get_decoder())
            length = int((prompt != PADDING).sum())
            hidden = self._decode(row_weight[:length], input_ids=ids[None, :length])
            rows.append(nn.functional.pad(hidden, (0, 0, 0, width - length)))
        return torch.cat(rows)

    def _decode(self, weight: Tensor, **inputs: Any) -> Tensor:
        """The decoder's last hidden states; adds what its routers did to `routing`.

        `weight`: how often each token of the input counts there.
        """
        decoder = self.lm.get_decoder()
        if not (self.training and self.balancing):
            return decoder(use_cache=False, **inputs).last_hidden_state
        output = decoder(use_cache=False, output_router_logits=True, **inputs)
        chosen = self.lm.config.get_text_config().num_experts_per_tok
        for logits in output.router_logits:
            layer = _routing(logits, weight.flatten(), chosen)
            if self.routing is not None:
                layer = Routing(*map(torch.add, self.routing, layer))
            self.routing = layer
        return output.last_hidden_state

    def _beyond_rope_limit(self, prompt: RenderedPrompt) -> bool:
        return self.rope_limit is not None and padded_tokens(prompt) > self.rope_limit


def _through_module(
    head: nn.Module, hidden: Tensor, targets: Tensor, rule: LogitRule, chunk: int
) -> Tensor:
    """For a head with an adapter and so a forward of its own: in chunks, recomputed backward."""

    def logps(rows: Tensor, picks: Tensor) -> Tensor:
        logits = head(rows)
        logits = rule.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return logits.gather(-1, picks[:, None]).squeeze(-1) - logits.logsumexp(-1)

    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(logps, *part, use_reentrant=False) for part in parts])


def _routing(logits: Tensor, weight: Tensor, chosen: int) -> Routing:
    """One layer's part of `Routing`: router logits [T, E], weights of the tokens [T]."""
    probability = logits.softmax(-1).float()
    experts = probability.detach().topk(chosen, dim=-1).indices
    assigned = weight.new_zeros(logits.shape[-1])
    assigned.scatter_add_(0, experts.flatten(), weight.repeat_interleave(chosen))
    return Routing(assigned, (probability * weight[:, None]).sum(0), weight.sum())


def _forget_longest(decoder: nn.Module) -> None:
    """Dynamic rotary embeddings keep the frequencies of the longest sequence seen so far."""
    for module in decoder.modules():
        if hasattr(module, "max_seq_len_cached"):
            vars(module)["max_seq_len_cached"] = 0


def logit_rule(lm: PreTrainedModel) -> LogitRule:
    """What the architecture does to the logits of its head, from the config."""
    config = lm.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(lm: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise `UserError` where the model's logits are not those of its decoder, head and rule, and
    where a token sees later ones.

    In eval mode: some models want more than token ids while they train.
    """
    training = lm.training
    lm.eval()
    hidden = lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    changed = torch.cat([input_ids[:, :-1], input_ids[:, :1]], 1)  # with another last token
    again = lm.get_decoder()(input_ids=changed, use_cache=False).last_hidden_state
    expected = lm(input_ids=input_ids, use_cache=False).logits
    lm.train(training)
    earlier = zip(hidden[0, :-1], again[0, :-1])
    # All of them: a router may send a single one elsewhere after rounding.
    if input_ids.shape[1] > 1 and not any(_close(*vectors) for vectors in earlier):
        raise UserError(
            f"{lm.config.model_type}: a token sees those after it, so it is no causal language "
            "model; choose another model"
        )
    head = lm.get_output_embeddings()
    if head is not None:
        ours = logit_rule(lm).apply(head(hidden.to(head.weight.dtype)).float())
        if ours.shape == expected.shape and _close(ours, expected):
            return
    raise UserError(
        f"{lm.config.model_type} changes its logits in an unknown way; "
        "score it with --engine vllm, or choose another model"
    )


def _close(values: Tensor, expected: Tensor) -> bool:
    """Whether they are equal, but for a model's rounding to bfloat16 after each operation."""
    return bool((values - expected).abs().max() <= 0.02 * values.abs().max())


def sum_by_sequence(values: Tensor, batch: Batch) -> Tensor:
    """[R] of scored tokens -> [S] sums, added in float64; float32 where a gradient is needed."""
    total = torch.zeros(len(batch.token_counts), dtype=torch.float64, device=values.device)
    total = total.index_add(0, batch.sequence, values.double())
    return total.float() if values.requires_grad else total


def split_by_sequence(values: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """[R] of scored tokens -> the values of each sequence separately, in text order."""
    return values.split(batch.token_counts)
