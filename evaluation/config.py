"""Settings of `mrpo doctor` and `mrpo evaluate`. Standard library only.

Settings of `mrpo compare`: its own, and all that it hands on to `mrpo train`.

Standard library only.


Settings of `mrpo audit`: flags, YAML keys and defaults. Standard library only.

Settings of `mrpo report`: flags, YAML keys and defaults. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..errors import UserError
from ..settings import Arg
from ..train.config import TrainConfig

PAIRS = "folder of pairs as `mrpo prepare` writes it"
REFS_CONFIG = "the file that says what an alias is"
STORE = "the score store, a folder or URL; by default $MRPO_STORE, else `store`"


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """Say of every reference whether its scores can be trusted, and what it is worth.

    Works from the stored scores: accuracy, likelihood, length, agreement with the others, and the
    traces that known faults leave. With --probe a few pairs are scored again in an independent
    way, where the weights are at hand; that shows what scores alone can't. Exit code 1 where a
    reference is broken.

    Example: `mrpo doctor --refs llama,mistral,qwen --probe 16`
    """

    refs: Annotated[str, "aliases of scored references, comma-separated; the first is the base"]
    pairs: Annotated[str, PAIRS] = "pairs"
    refs_config: Annotated[str, REFS_CONFIG] = "configs/refs.yaml"
    store: Annotated[str | None, STORE] = None
    probe: Annotated[int, "pairs to score again for each reference; 0: none"] = 0
    sample: Annotated[int, "pairs to look at, drawn at random where there are more"] = 20_000
    beta: Annotated[float, "DPO's and MRPO's beta, for the first loss"] = 0.1
    epsilon: Annotated[float, "half-width of MRPO's clipping (CTRO), for the saturation"] = 0.1
    out: Annotated[str, "the file to write; the settings go beside it"] = "doctor.json"

    def __post_init__(self) -> None:
        if self.probe < 0:
            raise UserError(f"--probe is {self.probe}; it must be 0 or more")
        if self.sample < 1:
            raise UserError(f"--sample is {self.sample}; it must be above 0")
        if not self.beta > 0:
            raise UserError(f"--beta is {self.beta}; it must be above 0")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Measure policies on held-out pairs: all on one scale, whatever method trained them.

    Accuracy by likelihood (summed, per token, per byte) and by implicit reward, that is by how
    much more than the base reference a policy prefers the chosen response; margins; by source;
    with intervals that draw whole prompts. A policy is scored as a reference is, by the same
    engines, and its scores are kept in the store: evaluating it again costs nothing.

    Example: `mrpo evaluate --runs runs/dpo,runs/mrpo --base llama`
    """

    policies: Annotated[
        str | None, "model folders, PEFT adapter folders or Hub ids, comma-separated"
    ] = None
    runs: Annotated[
        str | None, "folders of finished runs, comma-separated; pairs and base are taken from them"
    ] = None
    base: Annotated[
        str | None, "the scored reference that rewards are measured from; by default the runs' base"
    ] = None
    pairs: Annotated[str | None, f"{PAIRS}; by default the runs', else `pairs`"] = None
    refs_config: Annotated[str | None, f"{REFS_CONFIG}; by default the runs'"] = None
    store: Annotated[str | None, f"{STORE}; by default the runs'"] = None
    split: Annotated[
        Literal["validation", "train", "all"], "pairs to evaluate on; validation: the held-out ones"
    ] = "validation"
    engine: Annotated[
        Literal["hf", "vllm", "auto"], "what scores the policies, as in `mrpo precompute`"
    ] = "hf"
    max_tokens: Annotated[int | None, "tokens computed at once; by default chosen by device"] = None
    out: Annotated[str, "the file to write; the settings go beside it"] = "evaluate.json"

    def __post_init__(self) -> None:
        if not (self.policies or self.runs):
            raise UserError("nothing to evaluate; name models with --policies or runs with --runs")


Metric = Literal["reward", "sum", "token", "byte"]


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
    metric: Annotated[
        Metric,
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


@dataclass(kw_only=True, slots=True)
class AuditConfig:
    """List the pairs that most deserve a human look, from the references' scores.

    Pairs whose label the references find unlikely, pairs that divide the references, pairs whose
    label length alone explains, near duplicates with opposite labels. Fill in the table's column
    `decision` with keep, exclude or flip; `mrpo prepare --exclude audit.csv --flip audit.csv`
    reads it back.

    Example: `mrpo audit --pairs pairs --refs llama,mistral,qwen --out audit.csv`
    """

    refs: Annotated[str, "aliases of scored references, comma-separated"]
    pairs: Annotated[str, "folder of pairs as `mrpo prepare` writes it"] = "pairs"
    refs_config: Annotated[str, "the file that says what an alias is"] = "configs/refs.yaml"
    store: Annotated[
        str | None, "the score store, a folder or URL; by default $MRPO_STORE, else `store`"
    ] = None
    out: Annotated[str, "the table to write; figures by source go beside it as .json"] = "audit.csv"
    top: Annotated[int, "pairs to list for each reason"] = 100

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"--top is {self.top}; it must be above 0")
        if not self.out.endswith(".csv"):
            raise UserError(f"--out is {self.out}; the table is CSV, name it like audit.csv")


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Write one HTML page on references, runs and comparisons: plots, tables, what follows.

    The page holds everything it shows and asks for nothing from outside; the same figures go
    beside it as JSON. Without folders the page is about the references alone.

    Example: `mrpo report runs/compare,runs/mrpo --out report.html`
    """

    folders: Annotated[
        str | None, Arg("comma-separated folders of `mrpo train` and `mrpo compare`")
    ] = None
    refs: Annotated[
        str | None, "aliases of scored references, the base first; by default the folders'"
    ] = None
    pairs: Annotated[
        str | None, "folder of pairs as `mrpo prepare` writes it; by default the folders'"
    ] = None
    refs_config: Annotated[
        str | None, "the file that says what an alias is; by default the folders'"
    ] = None
    store: Annotated[str | None, "the score store; by default the folders'"] = None
    audit: Annotated[str | None, "a table that `mrpo audit` wrote, to show its figures"] = None
    out: Annotated[
        str | None, "the page to write; by default report.html in the first folder, else here"
    ] = None

    def __post_init__(self) -> None:
        if not self.folders and not self.refs:
            raise UserError("nothing to report on; name folders of runs, or references with --refs")
        if self.out is not None and not self.out.endswith(".html"):
            raise UserError(f"--out is {self.out}; the page is HTML, name it like report.html")
