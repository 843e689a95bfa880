"""Stage two: the stream of scored pairs, the loop, the checkpoints, the export."""

from ..settings import make_callable

make_callable(__name__, "train.run:train")  # mrpo.train(…)
