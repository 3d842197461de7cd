"""The command line: `burnish COMMAND`.

Each command lives in its own module of this package and is imported when it is called, so that `burnish --help` needs neither torch nor
transformers. Errors of the user's input end with one message and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.core.errors import BurnishError, did_you_mean
from burnish.core.garbage import paused

app = typer.Typer(
    name="burnish",
    help="Fine-tune open language models: one YAML file, one command, every token accounted for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Values that replace the file's, e.g. train.epochs=2.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"burnish {metadata.version('burnish')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


@app.command()
def train(file: RunFile, overrides: Overrides = None) -> None:
    """Train as the run file says."""
    from burnish.cli.train import main as command

    command(file, overrides or [])


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(metavar="RUN.yaml", help="The run file.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of run files, for editors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate a run file without loading a model."""
    from burnish.cli.check import main as command

    command(file, overrides or [], schema=schema, as_json=as_json)


@app.command()
def data(
    file: RunFile,
    overrides: Overrides = None,
    row: Annotated[
        str | None, typer.Option("--row", help="Show the example made from this row: N (from 1), or FILE:N of several files.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the view as a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is trained on: an account of every row and token, and rows with the trained tokens coloured."""
    with paused(keep=True):
        from burnish.cli.data import main as command

    command(file, overrides or [], row=row, html=html, as_json=as_json)


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A run folder, an adapter folder, or a model.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Answer this and stop; may be repeated.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the base model and the tuned one.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 42,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code shipped with the model.")] = False,
) -> None:
    """Talk to a model, before or after training."""
    with paused(keep=True):
        from burnish.cli.chat import main as command

    command(
        target,
        prompts=prompt or [],
        compare=compare,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def launch(
    kind: Annotated[str, typer.Argument(metavar="slurm|ray|sky", help="What runs the machines.")],
    file: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs of each machine; 0 trains on its CPUs.")] = 8,
    gpu: Annotated[str, typer.Option("--gpu", help="Their name, for sky.")] = "H100",
    time: Annotated[str, typer.Option("--time", help="Time limit, for slurm.")] = "24:00:00",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file instead of the screen.")] = None,
) -> None:
    """Write the file that starts a run on several machines."""
    from burnish.cli.launch import main as command

    command(kind, file, overrides or [], nodes=nodes, gpus=gpus, gpu=gpu, time=time, output=output)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Print versions and devices, and what each optional part needs."""
    from burnish.cli.doctor import main as command

    command(as_json=as_json)


@app.command()
def recipes(
    action: Annotated[str, typer.Argument(help="`list`, or `new`.")] = "list",
    name: Annotated[str | None, typer.Argument(help="For `new`: which recipe, e.g. sft.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file instead of the screen.")] = None,
) -> None:
    """List the recipes, or write a commented run file to start from."""
    from burnish.cli.recipes import main as command

    command(action, name, output)


def main() -> None:
    """The entry point: runs a command and turns errors into messages and exit codes."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="burnish", standalone_mode=False)
    except _USAGE_ERROR as error:
        print(f"error: {_usage_sentence(error)}\nTry 'burnish --help', or 'burnish COMMAND --help'.", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):  # before a command has begun
        sys.exit(130)
    except BurnishError as error:
        from burnish.core.log import print_error

        print_error(error)
        sys.exit(error.exit_code)
    sys.exit(code or 0)


# The base of all mistakes on the command line, which typer itself does not export.
_USAGE_ERROR: Any = typer.BadParameter.__base__


def _usage_sentence(error: Any) -> str:
    """The parser's complaint in our words, with the nearest name, and the way to what was probably meant."""
    message: str = error.format_message().strip().removesuffix(".")
    option: str | None = getattr(error, "option_name", None)
    if option and message.startswith("No such option"):
        known = [name for parameter in error.ctx.command.params for name in parameter.opts if name.startswith("--")] if error.ctx else []
        if "." in option:
            return f"there is no option '{option}'; a value of the run file is replaced by {option.lstrip('-')}=VALUE, without dashes"
        return f"there is no option '{option}'; {did_you_mean(option, [*known, '--help'])}"
    if message.startswith("No such command"):
        name = message.split("'")[1]
        if name.endswith((".yaml", ".yml")):
            return f"there is no command '{name}'; did you mean 'burnish train {name}'?"
        commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
        return f"there is no command '{name}'; {did_you_mean(name, commands)}"
    return f"{message[0].lower()}{message[1:]}"


if __name__ == "__main__":
    main()
