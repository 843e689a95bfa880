"""The whole method on a laptop: its own data, three tiny references, every command."""
