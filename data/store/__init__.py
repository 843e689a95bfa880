"""The score store: references, their scores, where the files are, and its commands."""

# ruff: noqa: F401 (what the folder offers)
from .scores import OVER_LIMIT, SCORE_SCHEMA, TOKEN_COLUMN, EarlierLayout, ScoreFiles
from .store import NotScored, ReferenceRecord, Store, open_store
