"""Several methods trained from one store: cells, workers, outcome, verdict."""
