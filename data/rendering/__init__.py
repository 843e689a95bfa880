"""Pairs to token ids, the same way for every model: template, text, tokens, split."""

from .renderer import (
    RENDERING_VERSION,
    ExplainedSequence,
    RenderedPair,
    RenderedSequence,
    Renderer,
)
from .template import TODAY, Refusal, RenderedText

__all__ = [
    "RENDERING_VERSION",
    "TODAY",
    "ExplainedSequence",
    "Refusal",
    "RenderedPair",
    "RenderedSequence",
    "RenderedText",
    "Renderer",
]
