"""Commands about what a node is and has: node, nodes, devices, nics."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import click

import peermem
from peermem.cli import output, parsing
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.core.units import format_size


@click.command()
@click.argument("name", default="")
@pass_settings
def node(settings: Settings, name: str) -> None:
    """Show this node, or the node NAME (nodes/NODE) of the directory."""
    info = settings.node.info(name)
    if settings.json:
        output.print_json(info)
        return
    output.print_facts(
        {
            "name": info.name,
            "address": info.address,
            "version": info.version,
            "started": info.start_time,
            "fabrics": info.fabrics,
            "nics": info.nics,
            "devices": [device.name for device in info.devices],
            "regions": f"{info.region_count} with {format_size(info.region_bytes)}",
            "running transfers": info.running_transfer_count,
            "links": info.link_count,
            "grants": info.grant_count,
        }
    )


@click.command()
@click.option("--watch", is_flag=True, help="Go on showing them until interrupted; with --json a line each time.")
@click.option("--interval", type=parsing.DURATION, default="2s", show_default=True, help="Between two looks.")
@pass_settings
def nodes(settings: Settings, watch: bool, interval: float) -> None:
    """List the nodes that the directory knows, and those that left it lately.

    STATE is up; gone, and for how long; or unconfirmed: for how long the directory has been away, so that nobody knows.
    LINKS are those that the asked node has open to it.
    """
    with output.LiveTable(drawn=watch and not settings.json) as table:
        while True:
            known = settings.node.nodes()
            if settings.json:
                output.print_json({"nodes": known}, on_a_line=watch)
            else:
                table.show(_NODES, [_node_row(info, settings.node.name) for info in known])
            if not watch:
                return
            time.sleep(interval)


_NODES = ("NAME", "ADDRESS", "STATE", "FABRICS", "NICS", "DEVICES", "LINKS", "VERSION", "EPOCH")


def _node_row(info: peermem.NodeInfo, here: str) -> tuple[object, ...]:
    return (
        info.name,
        info.address,
        "this node" if info.name == here else _state(info),
        info.fabrics,
        info.nics,
        [device.name for device in info.devices],
        None if info.name == here else info.links_here_count,
        info.version,
        info.epoch,
    )


def _state(info: peermem.NodeInfo) -> str:
    if info.state_time is None:
        return info.state.value.lower()
    passed = max(timedelta(), datetime.now(UTC) - info.state_time)
    return f"{info.state.value.lower()} for {timedelta(seconds=round(passed.total_seconds()))}"


@click.command()
@pass_settings
def devices(settings: Settings) -> None:
    """List the node's devices."""
    known = settings.node.devices()
    if settings.json:
        output.print_json({"devices": known})
        return
    rows = [
        (
            device.name,
            device.kind,
            format_size(device.size),
            format_size(device.available),
            device.path,
            device.region_count,
            device.pci_address,
            device.nics,
            device.why,
        )
        for device in known
    ]
    output.print_table(("NAME", "KIND", "SIZE", "AVAILABLE", "PATH", "REGIONS", "PCI", "NICS", "WHY"), rows)


@click.command()
@pass_settings
def nics(settings: Settings) -> None:
    """List the node's NIC ports."""
    known = settings.node.nics()
    if settings.json:
        output.print_json({"nics": known})
        return
    rows = [
        (
            nic.name,
            nic.state,
            nic.link_layer,
            f"{nic.rate / 1e9:g}Gb/s" if nic.rate else None,
            nic.numa_node,
            nic.pci_address,
            nic.gids,
            nic.error.message if nic.error else "in use",
        )
        for nic in known
    ]
    output.print_table(("NAME", "STATE", "LINK LAYER", "RATE", "NUMA", "PCI", "GIDS", "VERBS"), rows)
