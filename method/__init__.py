"""The method's formulas as pure functions over log-probs; docs/mathematics.md derives them."""
