"""Stage two: the mathematics of several references, the stream, the loop, the checkpoints."""
