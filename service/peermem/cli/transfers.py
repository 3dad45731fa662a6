"""Commands about transfers: transfer, transfers, cancel.

Rules of this file:

* An interrupted `transfer` leaves nothing running: it is cancelled, and the tool waits for the fence.
"""

from __future__ import annotations

from functools import partial

import click

import peermem
from peermem.cli import output, parsing
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.client.requests import request_id
from peermem.client.segments import Operand
from peermem.core.types import FabricKind
from peermem.core.units import format_duration, format_size

FABRIC = click.Choice([kind.value for kind in FabricKind])


@click.command()
@click.argument("src", type=parsing.RANGE, shell_complete=parsing.complete_regions)
@click.argument("dst", type=parsing.RANGE, shell_complete=parsing.complete_regions)
@click.option("--checksum", is_flag=True, help="Compare the CRC32C of both sides before success is reported.")
@click.option("--fabric", type=FABRIC, help="Insist on a fabric.")
@click.option("--deadline", type=parsing.DURATION, help="The transfer fails when it takes longer.")
@pass_settings
def transfer(
    settings: Settings, src: Operand, dst: Operand, checksum: bool, fabric: str | None, deadline: float | None
) -> None:
    """Move bytes from SRC to DST, each REGION or REGION:OFFSET+LENGTH.

    REGION is nodes/NODE/regions/REGION, on any node, or its last part for a region of the asked node.
    Interrupting the command cancels the transfer.
    """
    if isinstance(src, str) and isinstance(dst, str):
        src = settings.at_owner(partial(peermem.Node.region, name=src))  # its length counts for both
    ask = partial(
        settings.node.transfer, src, dst, checksum=checksum, fabric=fabric, timeout=deadline, request_id=request_id()
    )
    try:
        asked = ask()
        with output.Meter("transfer", settings.json) as meter:
            for progress in asked:
                meter.show(progress.bytes_done, progress.bytes_total, progress.rate)
    except KeyboardInterrupt:
        # Asking again means the same transfer, wherever in asking the interrupt came.
        ask().cancel(settings.timeout)
        raise
    _print(settings, asked.wait())


@click.command()
@click.option("--running", is_flag=True, help="Only those that have not ended.")
@pass_settings
def transfers(settings: Settings, running: bool) -> None:
    """List the node's transfers, newest first."""
    found = list(settings.node.transfers(running=running))
    if settings.json:
        output.print_json({"transfers": [_facts(info) for info in found]})
        return
    rows = [
        (
            info.name,
            info.state,
            format_size(info.bytes_done),
            format_size(info.bytes_total),
            info.fabric,
            info.direction,
            format_duration(info.duration) if info.duration is not None else None,
            output.rate(info.bandwidth),
            info.error.reason if info.error else None,
            info.owner,
        )
        for info in found
    ]
    output.print_table(
        ("NAME", "STATE", "DONE", "TOTAL", "FABRIC", "DIRECTION", "DURATION", "BANDWIDTH", "REASON", "OWNER"), rows
    )


@click.command()
@click.argument("name", shell_complete=parsing.complete_transfers)
@pass_settings
def cancel(settings: Settings, name: str) -> None:
    """Cancel a transfer, and wait until no byte of it is written any more."""
    whole = name if "/" in name else f"{settings.node.name}/transfers/{name}"
    _print(settings, settings.at_owner(lambda node: node.cancel_transfer(whole)))


def _facts(info: peermem.TransferInfo) -> dict[str, object]:
    facts = output.plain(info)
    return {**facts, "bandwidth": info.bandwidth}


def _print(settings: Settings, info: peermem.TransferInfo) -> None:
    if settings.json:
        output.print_json(_facts(info))
        return
    output.print_facts(
        {
            "name": info.name,
            "state": info.state,
            "bytes": f"{format_size(info.bytes_done)} of {format_size(info.bytes_total)}",
            "duration": format_duration(info.duration) if info.duration is not None else None,
            "bandwidth": output.rate(info.bandwidth),
            "fabric": info.fabric,
            "why": info.fabric_why,
            "path": info.path,
            "direction": info.direction,
            "crc32c": f"{info.crc32c:08x}" if info.crc32c is not None else None,
            "reason": info.error.reason if info.error else None,
        }
    )
