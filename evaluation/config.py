"""Settings of `mrpo evaluate`, `compare`, `doctor`, `audit` and `report`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from ..errors import UserError
from ..settings import (
    LAST_SEED,
    PAIRS,
    REFS_CONFIG,
    STORE,
    Arg,
    References,
    ScoredPairSettings,
    above_zero,
    at_least_zero,
    comma_separated,
    file_type,
    no_effect,
    seed,
)
from ..train.config import TrainConfig

Metric = Literal["reward", "sum", "token", "byte"]
Task = Literal["gsm8k", "truthfulqa_mc1", "truthfulqa_mc2"]
TASKS: tuple[Task, ...] = get_args(Task)

# Fields that `evaluate` and `compare` share, named as lm-evaluation-harness names them.
Tasks = Annotated[
    str | None,
    f"Tasks of lm-evaluation-harness to answer too, comma-separated: {', '.join(TASKS)}.",
]
TasksData = Annotated[
    str | None,
    "Folder with the tasks' questions (gsm8k_test.jsonl, gsm8k_train.jsonl, truthfulqa.csv, each "
    "also with .gz). By default the harness's own data sets on the Hub.",
]
NumFewshot = Annotated[int | None, "Solved examples before each question of gsm8k. By default 5."]
FewshotSeed = Annotated[int, "Seed that draws these examples."]
ApplyChatTemplate = Annotated[
    bool, "Ask the tasks' questions in the policy's chat template, each example as a turn."
]
Limit = Annotated[int | None, "Questions of each task, the first ones. By default all."]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """The tasks that policies answer, and how: a part of the settings of evaluate and compare."""

    tasks: Tasks = None
    tasks_data: TasksData = None
    num_fewshot: NumFewshot = None
    fewshot_seed: FewshotSeed = 1234
    apply_chat_template: ApplyChatTemplate = False
    limit: Limit = None

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in TASKS:
                raise UserError(f"--tasks {name}: unknown; the tasks are {', '.join(TASKS)}")
        if not self.names:
            no_effect(self, "without --tasks", *(field.name for field in fields(self)))
        if "gsm8k" not in self.names:
            no_effect(self, "without gsm8k among --tasks", "num_fewshot", "fewshot_seed")
        above_zero(self, "limit")
        at_least_zero(self, "num_fewshot")
        seed(self, "fewshot_seed")

    @classmethod
    def of(cls, config: Any) -> TaskSettings:
        """Those of a command's settings. Raises `UserError`."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def names(self) -> list[Task]:
        """The tasks; none without --tasks."""
        return comma_separated(self.tasks, "--tasks")  # type: ignore[return-value]

    @property
    def flags(self) -> str:
        """What of them is not the default, as flags, each after a space."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name for f in fields(self) if given[f.name] != f.default}
        words = [
            f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in given.items()
            if name in changed
        ]
        return "".join(words)


NO_TASKS = TaskSettings()


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Measure policies on held-out pairs, all on the same scale, whatever method trained them.

    Accuracy by likelihood (summed, per token, per byte) and by implicit reward, that is by how
    much more than the base reference a policy prefers the chosen response; margins; by source;
    with intervals that draw whole prompts. A policy is scored as a reference is, by the same
    engines, and its scores are kept in a part of the store of their own: evaluating it again
    costs nothing. With --tasks the policies also answer GSM8K and TruthfulQA, through
    lm-evaluation-harness; without --runs, --base or --pairs they do nothing else.

    Example: `mrpo evaluate --runs runs/dpo,runs/mrpo --base llama`
    """

    policies: Annotated[
        str | None, "Model folders, PEFT adapter folders or Hub ids, comma-separated."
    ] = None
    runs: Annotated[
        str | None, "Folders of finished runs, comma-separated; pairs and base are taken from them."
    ] = None
    base: Annotated[
        str | None,
        "The scored reference that rewards are measured from. By default the runs' base.",
    ] = None
    pairs: Annotated[str | None, f"{PAIRS} By default the runs', else `pairs`."] = None
    refs_config: Annotated[str | None, f"{REFS_CONFIG} By default the runs'."] = None
    store: Annotated[str | None, f"{STORE} By default the runs'."] = None
    split: Annotated[
        Literal["validation", "train", "all"],
        "Pairs to evaluate on; validation: the held-out ones.",
    ] = "validation"
    engine: Annotated[
        Literal["hf", "vllm", "auto"], "What scores the policies, as in `mrpo precompute`."
    ] = "hf"
    max_tokens: Annotated[int | None, "Tokens computed at once. By default chosen by device."] = (
        None
    )
    tasks: Tasks = None
    tasks_data: TasksData = None
    num_fewshot: NumFewshot = None
    fewshot_seed: FewshotSeed = 1234
    apply_chat_template: ApplyChatTemplate = False
    limit: Limit = None
    out: Annotated[
        str, "File to write; figures of the training in it are kept, the settings go beside it."
    ] = "evaluation.json"

    def __post_init__(self) -> None:
        if not (self.policies or self.runs):
            raise UserError("nothing to evaluate; name models with --policies or runs with --runs")
        TaskSettings.of(self)
        above_zero(self, "max_tokens")
        file_type(self.out, ".json", "results are JSON")

    @property
    def on_pairs(self) -> bool:
        """Whether pairs are evaluated on: always, but for policies that only answer tasks."""
        about_pairs = (self.runs, self.base, self.pairs, self.refs_config, self.max_tokens)
        return not self.tasks or any(about_pairs) or self.split != "validation"


@dataclass(kw_only=True, slots=True)
class CompareConfig(TrainConfig):
    """Train several methods from one store, and say which does better and how sure that is.

    Every combination of --methods (with --betas and --epsilons), --fractions, --label-noise and
    --seeds is one `mrpo train`, from the same policy; each is then judged by `mrpo evaluate` on the
    same held-out pairs. Run the command again and it continues: finished runs stay, failed ones are
    tried again. All other settings are those of `mrpo train` and hold for every run.

    Example: `mrpo compare --pairs pairs --refs llama,mistral,qwen --methods
    dpo:llama,dpo:mistral,dpo:qwen,mrpo --seeds 3 --fractions 0.05,0.2,1 --output-dir runs/compare`
    """

    output_dir: Annotated[str, "Folder of the comparison: settings, cells/, compare.json."]
    methods: Annotated[
        str,
        "METHOD[:ref/ref…][+weighting][+reliable], comma-separated; also soup[:ref/ref…][+vaw], "
        "the mean of the policies that DPO with each reference gives, and merge[:ref/ref…], the "
        "mean of the references' own weights.",
    ]
    refs: Annotated[
        str | None,
        "Aliases of references, comma-separated, the base first. By default those that --methods "
        "name.",
    ] = None
    seed: Annotated[int, "The first seed."] = 42
    seeds: Annotated[int, "Runs of each method and fraction; seeds count up from --seed."] = 3
    fractions: Annotated[
        str, "Shares of the training pairs, by prompt; a smaller one is part of every larger one."
    ] = "1"
    vary_subset: Annotated[
        bool,
        "Each seed draws fractions of its own, so that intervals hold over subsets too.",
    ] = False
    label_noise: Annotated[
        str,
        "Shares of the training prompts whose labels are turned round, as 0,0.15,0.3; a smaller "
        "one is part of every larger one. Held-out labels stay.",
    ] = "0"  # type: ignore[assignment]
    betas: Annotated[
        str | None,
        "Values of beta, as 0.1,0.5; every method has a run with each. By default --beta.",
    ] = None
    epsilons: Annotated[
        str | None,
        "Values of epsilon, as 0.1,1,none, for each method that clips: mrpo, and with --epsilon "
        "every method with several references.",
    ] = None
    metric: Annotated[
        Metric,
        "What decides: implicit reward against the base, or likelihood (summed, per token, per "
        "byte); all are reported.",
    ] = "reward"
    jobs: Annotated[int | None, "Runs at once. By default one for each GPU, or one."] = None
    keep_models: Annotated[bool, "Keep each run's model once it is evaluated."] = True
    tasks: Tasks = None
    tasks_data: TasksData = None
    num_fewshot: NumFewshot = None
    fewshot_seed: FewshotSeed = 1234
    apply_chat_template: ApplyChatTemplate = False
    limit: Limit = None

    # Set for each run.
    method: Annotated[str, "Of one run."] = field(init=False, default="")
    train_fraction: Annotated[float, "Of one run."] = field(init=False, default=1.0)
    train_subset: Annotated[int, "Of one run."] = field(init=False, default=0)
    resume: Annotated[bool, "Always."] = field(init=False, default=True)
    run_name: Annotated[str | None, "Of one run."] = field(init=False, default=None)

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        TaskSettings.of(self)
        above_zero(self, "seeds", "jobs")
        if (last := self.seed + self.seeds - 1) > LAST_SEED:
            raise UserError(
                f"--seeds {self.seeds} from --seed {self.seed} end at {last}; seeds go up to "
                f"{LAST_SEED}"
            )


@dataclass(kw_only=True, slots=True)
class DoctorConfig(ScoredPairSettings):
    """Say for every reference whether its scores can be trusted, and what it adds.

    Works from the stored scores: accuracy, likelihood, length, agreement with the others, the
    traces that known faults leave, and a forecast: which methods can differ from DPO with the base
    on these pairs. With --probe a few pairs are scored again in an independent
    way, where the weights are available; that shows what scores alone can't. Exit code 1 where a
    reference is broken.

    Example: `mrpo doctor --refs llama,mistral,qwen --probe 16`
    """

    refs: References
    probe: Annotated[int, "Pairs to score again for each reference; 0: none."] = 0
    sample: Annotated[int, "Pairs to look at, drawn at random where there are more."] = 20_000
    methods: Annotated[
        str | None,
        "Methods to forecast, METHOD[:ref/ref…][+weighting][+reliable], comma-separated. By "
        "default DPO with each reference and the usual ways to use several.",
    ] = None
    beta: Annotated[
        str | None,
        "Beta of the first loss, and after commas others for the forecast. By default 0.1,0.5; "
        "2.5,12.5 with --normalize.",
    ] = None
    epsilon: Annotated[
        float, "Half-width of MRPO's clipping (CTRO), for saturation and forecast."
    ] = 0.1
    normalize: Annotated[
        Literal["none", "token", "byte"],
        "What log-probs are divided by, for first loss and forecast.",
    ] = "none"
    out: Annotated[str, "File to write; the settings go beside it."] = "doctor.json"

    def __post_init__(self) -> None:
        at_least_zero(self, "probe", "epsilon")
        above_zero(self, "sample")
        file_type(self.out, ".json", "results are JSON")


@dataclass(kw_only=True, slots=True)
class AuditConfig(ScoredPairSettings):
    """List the pairs that most deserve a human look, from the references' scores.

    Pairs whose label the references find unlikely, pairs that divide the references, pairs whose
    label length alone explains, near duplicates with opposite labels. Fill in the table's column
    `decision` with keep, exclude or flip; `mrpo prepare --exclude audit.csv --flip audit.csv`
    reads it back.

    Example: `mrpo audit --pairs pairs --refs llama,mistral,qwen --out audit.csv`
    """

    refs: References
    out: Annotated[str, "Table to write; figures by source go to NAME.csv.json."] = "audit.csv"
    top: Annotated[int, "Pairs to list for each reason."] = 100

    def __post_init__(self) -> None:
        above_zero(self, "top")
        file_type(self.out, ".csv", "the table is CSV")


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Write one HTML page on references, runs and comparisons: plots, tables, conclusions.

    The page holds everything it shows and loads nothing from outside; the same figures go
    beside it as JSON. Without folders the page is about the references alone.

    Example: `mrpo report runs/compare,runs/mrpo --out report.html`
    """

    folders: Annotated[
        str | None, Arg("Folders of `mrpo train` and `mrpo compare`, comma-separated.")
    ] = None
    refs: Annotated[
        str | None,
        "Aliases of scored references, comma-separated, the base first. By default the folders'.",
    ] = None
    pairs: Annotated[str | None, f"{PAIRS} By default the folders'."] = None
    refs_config: Annotated[str | None, f"{REFS_CONFIG} By default the folders'."] = None
    store: Annotated[str | None, f"{STORE} By default the folders'."] = None
    audit: Annotated[str | None, "A table that `mrpo audit` wrote, to show its figures."] = None
    out: Annotated[
        str | None, "Page to write. By default report.html in the first folder, else here."
    ] = None

    def __post_init__(self) -> None:
        if not (self.folders or self.refs):
            raise UserError("nothing to report on; name folders of runs, or references with --refs")
        file_type(self.out, ".html", "the page is HTML")
