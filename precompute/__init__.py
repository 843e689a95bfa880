"""Stage one: score the missing pairs of every reference. The only folder that imports vLLM or Ray."""
