"""What the commands of the store share: which references are meant, and sizes to read."""

from __future__ import annotations

from ..errors import UserError
from .store import Store


def selected(store: Store, refs: str | None) -> list[str]:
    """The identities that a comma-separated list of aliases means; all without one.

    An alias means every identity it ever had; `alias@prefix` the one.
    """
    if refs is None:
        return store.identities()
    found: list[str] = []
    records = store.references()
    for alias in (part.strip() for part in refs.split(",")):
        same = [record.identity for record in records if record.alias == alias]
        if "@" in alias:
            same = [store.resolve(alias).identity]
        if not same:
            known = ", ".join(sorted({record.alias for record in records})) or "none"
            raise UserError(f"--refs: {store.root} knows no {alias!r}; it has {known}")
        found += [identity for identity in same if identity not in found]
    return found


def require(store: Store) -> None:
    """Raises `UserError` where there is no store, so that a wrong path is no healthy store."""
    if not store.identities():
        raise UserError(
            f"--store {store.root}: holds no references; `mrpo precompute` fills a store, "
            "--store or $MRPO_STORE names one"
        )


def readable_size(num_bytes: int) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = min((len(str(num_bytes)) - 1) // 3, 4)
    return f"{num_bytes / 1000**power:.1f} {' kMGT'[power]}B"
