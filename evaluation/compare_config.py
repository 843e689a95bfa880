"""Settings of `mrpo compare`: its own, and all that it hands on to `mrpo train`.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..errors import UserError
from ..train.config import TrainConfig

Yardstick = Literal["reward", "sum", "token", "byte"]


@dataclass(kw_only=True, slots=True)
class CompareConfig(TrainConfig):
    """Train several methods from one store, and say which does better and how sure that is.

    Every combination of --methods, --fractions and --seeds is one `mrpo train`, from the same
    policy; each is then judged by `mrpo evaluate` on the same held-out pairs. Run the command
    again and it goes on: finished runs stay, failed ones are tried again. All other settings are
    those of `mrpo train` and hold for every run.

    Example: `mrpo compare --pairs pairs --refs llama,mistral,qwen --methods
    dpo:llama,dpo:mistral,dpo:qwen,mrpo --seeds 3 --fractions 0.05,0.2,1 --output-dir runs/compare`
    """

    output_dir: Annotated[str, "Folder of the comparison: settings, cells/, compare.json."]
    refs: Annotated[
        str | None, "Aliases in order, the base first. By default those that --methods name."
    ] = None
    seed: Annotated[int, "The first seed."] = 42
    methods: Annotated[str, "METHOD[:ref/ref...][+weighting], comma-separated."]
    seeds: Annotated[int, "Runs of each method and fraction; seeds count up from --seed."] = 3
    fractions: Annotated[
        str, "Shares of the training pairs, by prompt; a smaller one is part of every larger one."
    ] = "1"
    yardstick: Annotated[
        Yardstick,
        "What decides: implicit reward against the base, or likelihood (summed, per token, per "
        "byte). All are reported.",
    ] = "reward"
    jobs: Annotated[int | None, "Runs at once. By default one for each GPU, or one."] = None
    keep_models: Annotated[bool, "Keep each run's model once it is evaluated."] = True

    # Set for each run.
    method: Annotated[str, "of one run"] = field(init=False, default="")
    train_fraction: Annotated[float, "of one run"] = field(init=False, default=1.0)
    resume: Annotated[bool, "always"] = field(init=False, default=True)
    run_name: Annotated[str | None, "of one run"] = field(init=False, default=None)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.seeds < 1:
            raise UserError(f"--seeds is {self.seeds}; it must be above 0")
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs is {self.jobs}; it must be above 0")
