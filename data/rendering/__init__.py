"""Responses to token ids, the same way for every model: template, text, tokens, split."""

# ruff: noqa: F401 (what the folder offers)
from .program import TODAY, run_template
from .renderer import (
    RENDERING_VERSION,
    ExplainedSequence,
    RenderedPrompt,
    RenderedSequence,
    Renderer,
    byte_tokenizer,
    load_tokenizer,
)
from .template import PLACES, Refusal, RenderedText
