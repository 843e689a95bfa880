"""Whether a reference's scores can be trusted: figures, checks, a probe, a diagnosis."""
