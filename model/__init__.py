"""A causal language model: loading it, packing pairs that share a prompt, token log-probs."""
