"""What rendering asks of a tokenizer: to be there, and offsets that cover the text.

Tokenizers differ in how characters lie under tokens: a normalizer joins some (NFC), a character of
several bytes lies under several tokens, a control token swallows the white space beside it, a
post-processor trims spaces off. `spans` makes one account of it, which `rendering.py` splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hub model or a model folder, or `UserError` where there is none."""
    from transformers import AutoTokenizer

    way_out = "name a model with one, or save one there with tokenizer.save_pretrained"
    try:
        # With mistral-common installed, AutoTokenizer might return its tokenizer: no offsets.
        loaded = AutoTokenizer.from_pretrained(
            model, revision=revision, mistral_format=False, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"model {model}: no tokenizer to load ({first_line}); {way_out}") from None
    tokenizer = with_offsets(loaded)
    # Of a folder without tokenizer files, transformers makes a tokenizer that knows no word.
    if not {*tokenizer("a", add_special_tokens=False).input_ids} - {*tokenizer.all_special_ids}:
        raise UserError(f"model {model}: no tokenizer there; {way_out}")
    return tokenizer


def with_offsets(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The tokenizer itself; `UserError` where it can't say which characters a token stands for."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    name = getattr(tokenizer, "name_or_path", None) or "the model"
    raise UserError(
        f"tokenizer of {name} ({type(tokenizer).__name__}) gives no character offsets, which "
        "scoring needs; use a model with a fast tokenizer (tokenizer.json)"
    )


def bare_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that adds no tokens, trims no offsets, truncates and pads nothing, whatever the
    model's tokenizer.json sets; ids without special tokens are the same."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bare.post_processor = None
    bare.no_truncation()
    bare.no_padding()
    return bare


def bos_in_use(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id that the tokenizer puts in front of plain text, if it puts BOS there."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def spans(
    text: str, encoding: Encoding, added: dict[int, AddedToken]
) -> Iterator[tuple[int, int, int]]:
    """(token index, begin, end) from the last token to the first, in characters of `text`.

    Characters that a normalizer dropped or joined to others (under NFC the accent to its letter)
    are under no token of the tokenizer's own; here the token in front of them holds them. An added
    token is taken literally: without the white space that it swallows, and holding nothing more.
    """
    following, last_end, last_stretched = len(text), -1, len(text)
    offsets, ids = encoding.offsets, encoding.ids
    for index in range(len(ids) - 1, -1, -1):
        begin, end = offsets[index]
        stretched = last_stretched if end == last_end else max(end, following)
        following, last_end, last_stretched = begin, end, stretched
        if (token := added.get(ids[index])) is not None and token.content.strip():
            if token.rstrip:
                end = begin + len(text[begin:end].rstrip())
            if token.lstrip:
                begin = end - len(text[begin:end].lstrip())
            yield index, begin, end
        else:
            yield index, begin, stretched
