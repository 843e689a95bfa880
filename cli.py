"""The command line: `mrpo COMMAND …`, `python -m mrpo COMMAND …`.

Every command is one line in a table: its name, the settings class that gives its flags and help,
and the function that does the work, the same that Python users call. Flags are made from the
class, merged over `--config run.yaml`, and the function is called once with the settings object.
Nothing heavy is imported before that call. This is the only place that turns an error into an exit
code: 2 for a user's mistake, 130 for an interrupt; otherwise the `exit_code` of the result, where
it has one.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mrpo.errors import UserError, at_path
from mrpo.settings import (
    ELSEWHERE,
    Setting,
    Several,
    build,
    imported,
    keyword,
    options,
    settings_of,
)

COMMANDS = {
    "prepare": ("data.config:PrepareConfig", "data.prepare:prepare"),
    "inspect": ("data.config:InspectConfig", "data.inspect:inspect"),
    "refs": ("precompute.config:RefsConfig", "precompute.refs:refs"),
    "precompute": ("precompute.config:PrecomputeConfig", "precompute.run:precompute"),
    "train": ("train.config:TrainConfig", "train.run:train"),
    "evaluate": ("evaluation.config:EvaluateConfig", "evaluation.evaluate:evaluate"),
    "doctor": ("evaluation.config:DoctorConfig", "evaluation.doctor.doctor:doctor"),
    "compare": ("evaluation.config:CompareConfig", "evaluation.compare.compare:compare"),
    "report": ("evaluation.config:ReportConfig", "evaluation.report.report:report"),
    "audit": ("evaluation.config:AuditConfig", "evaluation.audit.audit:audit"),
    "export": ("train.config:ExportConfig", "train.export:export"),
    "demo": ("demo.config:DemoConfig", "demo.run:demo"),
}
STORE_COMMANDS = {
    "status": ("data.config:StatusConfig", "data.store.commands:status"),
    "verify": ("data.config:VerifyConfig", "precompute.verify:verify"),
    "upgrade": ("data.config:UpgradeConfig", "data.store.upgrade:upgrade"),
    "gc": ("data.config:GcConfig", "data.store.commands:gc"),
    "push": ("data.config:PushConfig", "data.store.commands:push"),
    "pull": ("data.config:PullConfig", "data.store.commands:pull"),
    "import": ("data.config:ImportConfig", "data.store.import_scores:import_scores"),
}


def main() -> None:
    """The console script."""
    # TRL's users write --learning_rate, vLLM's --tensor-parallel-size: both work everywhere.
    arguments = [_hyphened(argument) for argument in sys.argv[1:]]
    try:
        code = application()(arguments, prog_name="mrpo", standalone_mode=False)
    except (UserError, OSError) as error:
        mistake = at_path(error) if isinstance(error, OSError) else error
        print(f"error: {mistake}", file=sys.stderr)
        code = 2
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        message = error.format_message().rstrip(".")
        if message:  # none where a group was called without a command: its help was shown
            way_out = f"; see `{context.command_path} --help`" if context else ""
            option = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
            if option in ELSEWHERE:
                way_out = f"; {ELSEWHERE[option]}"
            print(f"error: {message}{way_out}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def application() -> typer.Typer:
    """All commands with their help, as a Typer application."""
    look: dict[str, Any] = {
        "no_args_is_help": True,
        "add_completion": False,
        "pretty_exceptions_enable": False,
        "rich_markup_mode": "markdown",
    }
    app = typer.Typer(
        help="Fine-tune a language model on preference pairs with several reference models. "
        "The steps: `prepare` pairs, `precompute` the references' scores once, `train` as often "
        "as you like.",
        **look,
    )
    store = typer.Typer(help="Inspect and maintain the score store.", **look)
    for group, commands in ((app, COMMANDS), (store, STORE_COMMANDS)):
        for name, (config, function) in commands.items():
            group.command(name)(_command(imported(config), function))
    app.add_typer(store, name="store")
    return app


def _command(config: type, function: str) -> Callable[..., int]:
    """A function whose signature gives Typer the flags of a settings class."""

    def invoke(context: typer.Context, **values: Any) -> int:
        given = {
            name: value
            for name, value in values.items()
            if context.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]
        }
        file = given.pop("config", None)
        result = imported(function)(build(config, given, file))
        return result if isinstance(result, int) else int(getattr(result, "exit_code", 0))

    option = typer.Option("--config", help="A YAML file of these settings; flags win over it.")
    parameters = [
        keyword("context", annotation=typer.Context),
        *map(_parameter, settings_of(config)),
        keyword("config", default=None, annotation=Annotated[str | None, option]),
    ]
    invoke.__doc__ = inspect.getdoc(config)
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return invoke


def _parameter(setting: Setting) -> inspect.Parameter:
    """One setting as Typer sees it. None is required here: `--config` may give it."""
    kinds = [kind for kind in options(setting.type) if kind is not type(None)]
    literals = all(not isinstance(kind, type) for kind in kinds)
    # Typer knows no unions: `float | Literal["none"]` is read as text and checked by `build`.
    kind: Any = kinds[0] if len(kinds) == 1 and not literals else str
    if kinds == [Several]:
        kind = list[str]
    elif literals:
        kind = typing.Literal[tuple(kinds)]
    text = f"{setting.help} [required]" if setting.required else setting.help
    default = None if setting.required else setting.default
    default = list(default) if isinstance(default, tuple) else default
    if setting.positional:
        note: Any = typer.Argument(help=setting.help, show_default=False)
    elif kind is bool:  # --no-… also where the default is False: a YAML file may say True
        note = typer.Option(f"{setting.flag}/--no-{setting.flag[2:]}", help=text)
    else:
        also = [f"--{setting.also.replace('_', '-')}"] if setting.also else []
        note = typer.Option(setting.flag, *also, help=text)
    annotation: Any = Annotated[kind | None if default is None else kind, note]
    return keyword(setting.name, default=default, annotation=annotation)


def _hyphened(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


if __name__ == "__main__":
    main()
