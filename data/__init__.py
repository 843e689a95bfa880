"""Pairs, rendering to token ids, shards and the score store: no torch, no vLLM."""
