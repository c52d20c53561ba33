"""`buildmill`: the one program, whose parts are loaded only when they are asked for."""

import importlib
from importlib.metadata import PackageNotFoundError, version

import click

COMMANDS = {
    "audit": ("coordinator.cli.audit", "audit"),
    "coordinator": ("coordinator.cli.serve", "coordinator"),
    "drill": ("coordinator.cli.drill.command", "drill"),
    "migrate": ("coordinator.cli.serve", "migrate_command"),
    "retention": ("coordinator.cli.retention", "retention_command"),
    "runner": ("runner.cli", "runner"),
    "runners": ("coordinator.cli.runners", "runners"),
    "tenant": ("coordinator.cli.accounts", "tenant"),
    "token": ("coordinator.cli.accounts", "token"),
    "up": ("coordinator.cli.up", "up"),
    "user": ("coordinator.cli.accounts", "user"),
    "watch": ("coordinator.cli.remote", "watch"),
}


def program_version() -> str:
    """The version that is installed, or `unknown` in a bare tree."""
    try:
        return version("buildmill")
    except PackageNotFoundError:
        return "unknown"


class Lazily(click.Group):
    """Imports the module of a command when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)  # noqa: S101 - the table above is ours
        return command


@click.group(cls=Lazily, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(program_version(), prog_name="buildmill")
def main() -> None:
    """Buildmill: a coordinator that keeps builds, and runners that do them.

    `buildmill up` runs both on this machine. To use several machines, start `buildmill coordinator` on one
    and `buildmill runner` on each of the others.
    """
