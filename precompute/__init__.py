"""Stage one: score every reference's missing pairs. The only folder that imports vLLM or Ray."""

from ..settings import make_callable

make_callable(__name__, "precompute.run:precompute")  # mrpo.precompute(…)
