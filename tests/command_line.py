"""The package's command line, called in a test's own process."""

from functools import cache

import typer.testing

from transformers_nextflow.cli import app


get_command = cache(typer.main.get_command)
# For each call Typer would read the signatures of all commands anew, which takes longer than most calls.
typer.testing._get_command = get_command


def run_command(*arguments, **options) -> typer.testing.Result:
    """Run `transformers-nextflow` with arguments, which become texts; see `CliRunner.invoke` for options."""
    return typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def command_named(name: str):
    """A subcommand as Typer makes it, with its `params`."""
    return get_command(app).commands[name]
