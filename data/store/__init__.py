"""The score store: references, their scores, where the files are, and its commands."""

from .files import LocalFiles
from .scores import SCORE_SCHEMA, TOKEN_COLUMNS, ScoreFiles
from .store import NotScored, ReferenceRecord, Store, open_store

__all__ = [
    "SCORE_SCHEMA",
    "TOKEN_COLUMNS",
    "LocalFiles",
    "NotScored",
    "ReferenceRecord",
    "ScoreFiles",
    "Store",
    "open_store",
]
