"""How much arithmetic a forward pass needs, for model FLOPs utilization.

Counted are the products that the mathematics needs: every real token through the decoder's
weights, every query with the keys that its mask shows, every scored token through the head. A
packed batch counts each prompt once; padding and masked keys count nothing, whatever a kernel
computes. A training step counts three times as much; recomputed activations are not counted.
"""

from __future__ import annotations

from mrpo.model.load import layer_windows
from mrpo.model.logps import SequenceLogps
from mrpo.model.packing import PADDING, Batch


def forward_flops(logps: SequenceLogps, batch: Batch) -> int:
    """Floating-point operations of one forward; a multiplication with an addition counts as two."""
    config = logps.lm.config.get_text_config()
    real = batch.prompt != PADDING
    tokens = int(real.sum())
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = batch.position_ids[real]
    attention = 0
    for window in layer_windows(config):
        keys = positions + 1 if window is None else (positions + 1).clamp(max=window)
        # Two products over all heads' widths: queries with keys, attention with values.
        attention += 4 * config.num_attention_heads * width * int(keys.sum())
    head = 2 * config.hidden_size * config.vocab_size * len(batch.targets)
    return 2 * layer_weights(logps) * tokens + attention + head


def layer_weights(logps: SequenceLogps) -> int:
    """How many weights of the decoder's layers each token is multiplied with."""
    config = logps.lm.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", 1)
    total = 0
    for parameter in logps.decoder_layers.parameters():
        if parameter.ndim == 2:
            total += parameter.numel()
        elif parameter.ndim == 3:  # all experts of a layer in one tensor
            total += parameter.numel() * config.num_experts_per_tok // experts
    return total
