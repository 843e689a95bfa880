"""The Hub, asked two things: which commit a model is at, and what its configuration says.

Both go through `hf_hub_download`, which answers from its cache where the Hub can't be reached.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError


def hub_commit(name: str, revision: str | None, file: str = "config.json") -> str:
    """The commit that a branch, tag or commit of a Hub model now stands for, 40 hex digits."""
    # The cache's path of any file is …/snapshots/<commit>/<file>.
    return _download(name, revision, file).parent.name


def hub_config(name: str, revision: str | None, file: str = "config.json") -> dict[str, Any]:
    """A JSON file of a Hub model."""
    content = json.loads(_download(name, revision, file).read_text(encoding="utf-8"))
    assert isinstance(content, dict), content
    return content


def _download(name: str, revision: str | None, file: str) -> Path:
    """Raises `UserError` where the model is unknown, gated, or neither reachable nor cached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except GatedRepoError:
        raise UserError(
            f"{name}: gated on the Hub; accept its terms on its page and run `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{name}: no such model on the Hub, or a private one; check the name in refs.yaml, "
            "or run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the Hub has no revision {revision!r}; check refs.yaml") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name}: not in the Hub's cache, and the Hub can't be reached; connect, or name a "
            "local folder in refs.yaml"
        ) from None
    except EntryNotFoundError:
        raise UserError(f"{name}: has no {file}; is it a model that transformers loads?") from None
