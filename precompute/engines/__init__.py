"""Token ids in, token log-probs out: transformers, vLLM, a vLLM server."""
