"""One HTML page on references, runs and comparisons."""
