"""Stage one: score every reference's missing pairs. The only folder that imports vLLM or Ray."""
