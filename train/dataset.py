"""Pairs beside their joined scores, row for row: what a training run reads, shard by shard.

The folder of pairs and the folder of joined scores have the same shards, and row numbers are
those within a shard. `stream.py` decides the order in which rows are read. `method_of` is the
method of a command's settings, over the joined columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..data.ids import digest_of, ids_to_numpy
from ..data.join import JoinedScores, matrix
from ..data.pairs import Pair, in_fraction, label_turned, prompt_number
from ..data.shards import PairShards
from ..data.tables import PAIR_COLUMNS, from_table
from ..errors import UserError
from ..files import write_bytes
from ..method.grammar import aliases_of, parse_method, refuse_average
from ..method.mixture import parse_loss_weights
from ..method.objective import Method, ReferenceLogps
from .config import MethodConfig, TrainConfig
from .distributed import ALONE, Ranks

Rows = np.ndarray  # [n] int64, row numbers within a shard
USES = "uses.bin"  # beside the joined scores: a byte a row, which says what it is used for
DIGEST_LENGTH = 32  # hex digits at its end
UNUSABLE, TRAINING, HELD_OUT, LEFT_OUT, REFUSED = range(5)
SHORT_COLUMNS = ["split", "chosen_bytes", "rejected_bytes"]  # quick to read


ReasonsOf = Callable[[Sequence[Pair]], Sequence[str | None]]  # why the policy can't take a pair


class Usable(NamedTuple):
    """What the rows of a training run are used for."""

    training: list[Rows]  # of each shard
    held_out: list[Rows]
    unusable: int  # pairs without a score of the base
    refused: dict[str, int]  # training pairs that the policy can't take, by reason


def method_of(config: MethodConfig) -> Method:
    """The method that a command's settings name, over exactly the references that it uses.

    Its columns are those of the joined scores, which are in the method's order.
    """
    refuse_average(config.method)
    method = parse_method(
        config.method,
        aliases_of(config.refs, config.method),
        reference_kind=config.reference_kind,
        weighting=config.weighting,
        weights=config.weights,
        epsilon=config.epsilon,
        adaptive_epsilon=config.adaptive_epsilon,
    )
    if isinstance(config, TrainConfig):  # an export leaves the loss to the other trainer
        method = replace(
            method,
            normalize=config.normalize,
            beta=config.beta,
            loss_type=config.loss_type,
            loss_weights=parse_loss_weights(config.loss_weights),
            f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=config.f_alpha_divergence_coef,
            label_smoothing=config.label_smoothing,
            sft_weight=config.sft_weight,
        )
    return replace(method, columns=tuple(range(len(method.references))))


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some rows in memory, in the order in which they are read."""

    table: pa.Table  # of the pairs
    scores: ReferenceLogps

    def __len__(self) -> int:
        return len(self.table)

    def pairs(self, start: int, stop: int) -> list[Pair]:
        return from_table(self.table.slice(start, stop - start))

    def prompts(self) -> np.ndarray:
        """[n] int64, the same number for the pairs of a prompt."""
        return prompts_of(self.table)

    def ids(self, places: Rows) -> list[bytes]:
        """The pairs' ids, 16 bytes each."""
        column = self.table["pair_id"].take(pa.array(places, pa.int64()))
        return [pair_id.tobytes() for pair_id in ids_to_numpy(column)]


class Window:
    """Rows of several shards in memory, from which any can be taken in any order."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks
        self._first = np.cumsum([0, *map(len, chunks)])  # place of each chunk's first row

    def prompts(self) -> np.ndarray:
        """[n] int64 of all rows, as `Chunk.prompts`."""
        return np.concatenate([chunk.prompts() for chunk in self._chunks])

    def take(self, places: Rows) -> Chunk:
        """The rows at the given places, in that order; places count through all chunks."""
        of_chunk = np.searchsorted(self._first, places, side="right") - 1
        tables, scores = [], []
        for index in np.unique(of_chunk):
            rows = places[of_chunk == index] - self._first[index]
            tables.append(self._chunks[index].table.take(pa.array(rows, pa.int64())))
            scores.append((self._chunks[index].scores, rows))
        # Rows now stand chunk by chunk: bring them back into the order asked for.
        back = np.argsort(np.argsort(of_chunk, kind="stable"))
        table = pa.concat_tables(tables).take(pa.array(back, pa.int64()))
        return Chunk(table, stacked([(stacked(scores), back)]))


class TrainingPairs:
    """A folder of pairs and the scores that were joined to it."""

    def __init__(
        self,
        pairs: PairShards,
        scores: JoinedScores,
        prompt_numbers: bool,
        fraction: float = 1.0,
        label_noise: float = 0.0,
        seed: int = 0,
        subset: int = 0,
    ) -> None:
        """
        Args:
            prompt_numbers: fill `ReferenceLogps.prompts`, for which every prompt is read.
            fraction: share of the training prompts to use; `subset` says which draw of it.
            label_noise: share of the training prompts whose chosen and rejected responses change
                places, with their scores; `seed` draws them.
        """
        if (pairs.names, pairs.rows) != (scores.names, scores.rows):
            raise _other_pairs(pairs, scores)
        self.pairs, self.joined, self.num_shards = pairs, scores, len(pairs.names)
        self.prompt_numbers, self.fraction = prompt_numbers, fraction
        self.label_noise, self.seed, self.subset = label_noise, seed, subset
        self._turned: dict[int, np.ndarray] = {}  # by shard

    def scores(self, shard: int) -> tuple[ReferenceLogps, np.ndarray]:
        """The scores of a whole shard, and [rows] bool: which are held out."""
        columns = ["pair_id", *SHORT_COLUMNS, *(PAIR_COLUMNS if self.prompt_numbers else [])]
        table = self.pairs.table(shard, list(dict.fromkeys(columns)))
        held_out = table["split"].to_numpy(zero_copy_only=False) == "validation"
        turned = self.turned(shard)
        table, joined = (_exchanged(t, turned) for t in (table, self._joined(shard, table)))
        return self._scores(table, joined), held_out

    def chunk(self, shard: int, rows: Rows) -> Chunk:
        """The given rows of a shard, in the given order."""
        indices = pa.array(rows, pa.int64())
        turned, table = self.turned(shard)[rows], self.pairs.table(shard)
        table, joined = (
            _exchanged(whole.take(indices), turned) for whole in (table, self._joined(shard, table))
        )
        return Chunk(table, self._scores(table, joined))

    def turned(self, shard: int) -> np.ndarray:
        """[rows] bool: training pairs whose label `label_noise` turns round."""
        if shard not in self._turned:
            pairs = self.pairs.pairs(shard) if self.label_noise else []
            turned = [
                pair.split != "validation"
                and label_turned(pair.prompt, self.label_noise, self.seed)
                for pair in pairs
            ]
            self._turned[shard] = np.array(turned or [False] * self.pairs.rows[shard], bool)
        return self._turned[shard]

    def prepared(self, method: Method) -> Method:
        """The method with what it learns from the data, if it learns anything."""
        if not method.learns:
            return method
        parts = [(*self.scores(shard), self._left_out(shard)) for shard in range(self.num_shards)]
        training = stacked([(scores, np.flatnonzero(~held & ~out)) for scores, held, out in parts])
        held_out = stacked([(scores, np.flatnonzero(held)) for scores, held, _ in parts])
        return method.prepare(training, held_out)

    def usable(
        self,
        method: Method,
        *,
        resumed: bool = False,
        reasons_of: ReasonsOf | None = None,
        ranks: Ranks = ALONE,
    ) -> Usable:
        """The rows of each shard to train on and those held out.

        All scores are read for that, and with `reasons_of` every such pair is rendered, each
        process its share of the shards. The result is stored beside the scores, and a resumed
        run, whose method and policy are the same, reads it from there.
        """
        path, refused = self.joined.path / USES, Counter[str]()
        data = path.read_bytes() if resumed and path.is_file() else b""
        kinds = np.frombuffer(data[:-DIGEST_LENGTH], np.uint8)
        if data[-DIGEST_LENGTH:] != digest_of(kinds.tobytes()).encode():  # absent or damaged
            of_shards = [self._kinds(method, shard) for shard in range(self.num_shards)]
            if reasons_of is not None:
                own = range(ranks.rank, self.num_shards, ranks.world)
                parts = ranks.gather({n: self._taken(of_shards[n], n, reasons_of) for n in own})
                taken = dict(item for part in parts for item in part.items())
                of_shards = [taken[shard][0] for shard in range(self.num_shards)]
                for shard in range(self.num_shards):
                    refused.update(taken[shard][1])
            kinds = np.concatenate(of_shards)
            if ranks.first:
                write_bytes(path, kinds.tobytes() + digest_of(kinds.tobytes()).encode())
        split = np.split(kinds, np.cumsum(self.pairs.rows)[:-1])
        training = [np.flatnonzero(rows == TRAINING) for rows in split]
        held_out = [np.flatnonzero(rows == HELD_OUT) for rows in split]
        return Usable(training, held_out, int((kinds == UNUSABLE).sum()), dict(refused))

    def _taken(
        self, kinds: np.ndarray, shard: int, reasons_of: ReasonsOf
    ) -> tuple[np.ndarray, Counter[str]]:
        """The uses of a shard's rows without what the policy can't take, and why training pairs
        were refused."""
        rows = np.flatnonzero((kinds == TRAINING) | (kinds == HELD_OUT))
        pairs = from_table(self.pairs.table(shard).take(pa.array(rows, pa.int64())))
        reasons = reasons_of(pairs)
        training = kinds[rows] == TRAINING
        counts = Counter(
            reason for reason, is_training in zip(reasons, training) if reason and is_training
        )
        kinds = kinds.copy()
        kinds[rows[[reason is not None for reason in reasons]]] = REFUSED
        return kinds, counts

    def _kinds(self, method: Method, shard: int) -> np.ndarray:
        scores, held_out = self.scores(shard)
        kinds = np.where(held_out, HELD_OUT, np.where(self._left_out(shard), LEFT_OUT, TRAINING))
        return np.where(method.usable(scores), kinds, UNUSABLE).astype(np.uint8)

    def _left_out(self, shard: int) -> np.ndarray:
        """[rows] bool: which training pairs `fraction` leaves out."""
        if self.fraction >= 1:
            return np.zeros(self.pairs.rows[shard], bool)
        pairs = self.pairs.pairs(shard)
        return np.array([not in_fraction(p.prompt, self.fraction, self.subset) for p in pairs])

    def _joined(self, shard: int, table: pa.Table) -> pa.Table:
        """The scores of a shard's pairs; raises `UserError` where they are of other pairs."""
        joined = self.joined.table(shard)
        if not np.array_equal(ids_to_numpy(table["pair_id"]), ids_to_numpy(joined["pair_id"])):
            raise _other_pairs(self.pairs, self.joined)
        return joined

    def _scores(self, table: pa.Table, joined: pa.Table) -> ReferenceLogps:
        prompts = prompts_of(table) if self.prompt_numbers else np.zeros(len(table), np.int64)
        return ReferenceLogps(
            ref_chosen_logps=matrix(joined, "ref_chosen_logps"),
            ref_rejected_logps=matrix(joined, "ref_rejected_logps"),
            ref_chosen_tokens=matrix(joined, "ref_chosen_tokens"),
            ref_rejected_tokens=matrix(joined, "ref_rejected_tokens"),
            chosen_bytes=table["chosen_bytes"].to_numpy(),
            rejected_bytes=table["rejected_bytes"].to_numpy(),
            prompts=prompts,
        )


def prompts_of(table: pa.Table) -> np.ndarray:
    """[n] int64 of a table of pairs, the same number for equal prompts."""
    return np.array([prompt_number(pair.prompt) for pair in from_table(table)], np.int64)


def _other_pairs(pairs: PairShards, scores: JoinedScores) -> UserError:
    return UserError(
        f"{scores.path} was joined to other pairs than those in {pairs.path}; "
        "use another --output-dir"
    )


def _exchanged(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The table with its chosen and rejected columns exchanged in some rows, [n] bool."""
    if not rows.any():
        return table
    own = np.arange(len(table))
    for chosen in [name for name in table.column_names if "chosen" in name]:
        names = [chosen, chosen.replace("chosen", "rejected")]
        both = pa.concat_arrays([table[name].combine_chunks() for name in names])
        for name, second in zip(names, (rows, ~rows)):
            column = both.take(pa.array(own + len(table) * second))
            at = table.column_names.index(name)
            table = table.set_column(at, table.schema.field(at), column)
    return table


def stacked(parts: Sequence[tuple[ReferenceLogps, Rows]]) -> ReferenceLogps:
    """The given rows of each part, one after the other."""
    return ReferenceLogps(
        **{
            field.name: np.concatenate([getattr(part, field.name)[rows] for part, rows in parts])
            for field in fields(ReferenceLogps)
        }
    )
