"""A causal language model: loading it, packing pairs that share a prompt, per-sequence log-probs."""
