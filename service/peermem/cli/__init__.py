"""peermemctl: nodes, devices, regions and transfers from the command line.

Exit codes:

    0    done
    1    the operation failed; the reason is on stderr
    2    the command line is wrong
    3    the node can't be reached, or is shutting down
    4    no such region, transfer, device or node
    5    not allowed, or not known who asks
    6    a timeout passed
    130  interrupted; a transfer was cancelled and its fence has been raised

Rules of this package:

* It is a client like any other: `peermem.connect` and nothing of the daemon, but for the policy's file.
* Facts go to stdout, as a table or with --json as one JSON document; progress and faults go to stderr.
* A fault is one line, `error: sentence (REASON)`, or with --json one JSON object. Never a traceback.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from textwrap import dedent
from typing import Any

import click
from click.shell_completion import get_completion_class

from peermem.cli import bench, nodes, output, policy, preflight, regions, transfers
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.core.errors import Code, InvalidField, PeermemError

_NAME = "peermemctl"
_COMPLETE = "_PEERMEMCTL_COMPLETE"
_FAILED = 1
_USAGE = 2
_INTERRUPTED = 130
_EXIT_CODES = {
    Code.UNAVAILABLE: 3,
    Code.NOT_FOUND: 4,
    Code.PERMISSION_DENIED: 5,
    Code.UNAUTHENTICATED: 5,
    Code.DEADLINE_EXCEEDED: 6,
}
_EXIT_HELP = dedent((__doc__ or "").partition("Exit codes:\n\n")[2].partition("\n\nRules")[0])


class Tool(click.Group):
    """The group of all commands, which turns faults into exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        settings = ctx.ensure_object(Settings)
        try:
            return super().invoke(ctx)
        except PeermemError as fault:
            output.print_fault(fault, settings.json)
            ctx.exit(_USAGE if isinstance(fault, InvalidField) else _EXIT_CODES.get(fault.code, _FAILED))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(_INTERRUPTED)
        finally:
            settings.close()


@click.group(cls=Tool, epilog="Exit codes:\n\n\b\n" + _EXIT_HELP)
@pass_settings
def tool(settings: Settings) -> None:
    """Look at and work with a node of peermem: its devices, regions and transfers.

    Sizes are written as 64MiB, durations as 30s. The options stand before or after a command's name. For a daemon
    that is reached over TLS, PEERMEM_CLIENT_CA, _CERTIFICATE, _KEY and _TOKEN name files, and _SERVER a name in the
    daemon's certificate.
    """


@tool.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell; for bash: source <(peermemctl completion bash)."""
    kind = get_completion_class(shell)
    assert kind is not None, "click has a class for each shell of the choice"
    click.echo(kind(tool, {}, _NAME, _COMPLETE).source())


@tool.command("version")
@pass_settings
def show_version(settings: Settings) -> None:
    """Print the tool's version."""
    try:
        installed = version("peermem")
    except PackageNotFoundError:
        installed = "not installed"
    if settings.json:
        output.print_json({"version": installed})
    else:
        click.echo(installed)


for command in (
    nodes.node,
    nodes.nodes,
    nodes.devices,
    nodes.nics,
    preflight.preflight,
    policy.policy,
    regions.regions,
    transfers.transfer,
    transfers.transfers,
    transfers.cancel,
    bench.bench,
):
    tool.add_command(command)


def main() -> None:
    """Run peermemctl."""
    tool(prog_name=_NAME, complete_var=_COMPLETE)
