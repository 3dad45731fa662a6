"""Commands about nodes: node, nodes, devices, nics, preflight."""

from __future__ import annotations

import click

from peermem.cli import output, parsing
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.core.units import format_duration, format_size


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
            "regions": f"{info.region_count} with {format_size(info.region_bytes)}",
            "running transfers": info.running_transfer_count,
            "links": info.link_count,
            "grants": info.grant_count,
        }
    )


@click.command()
@pass_settings
def nodes(settings: Settings) -> None:
    """List the nodes that the directory knows."""
    known = settings.node.nodes()
    if settings.json:
        output.print_json({"nodes": known})
        return
    here = settings.node.name
    rows = [(info.name, info.address, info.fabrics, "this node" if info.name == here else None) for info in known]
    output.print_table(("NAME", "ADDRESS", "FABRICS", ""), rows)


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
        )
        for device in known
    ]
    output.print_table(("NAME", "KIND", "SIZE", "AVAILABLE", "PATH", "REGIONS"), rows)


@click.command()
@pass_settings
def nics(settings: Settings) -> None:
    """List the node's NIC ports."""
    known = settings.node.nics()
    if settings.json:
        output.print_json({"nics": known})
        return
    rows = [(nic.name, nic.state, nic.link_layer, f"{nic.rate / 1e9:g}Gb/s", nic.numa_node) for nic in known]
    output.print_table(("NAME", "STATE", "LINK LAYER", "RATE", "NUMA"), rows)


@click.command()
@click.argument("devices", nargs=-1, shell_complete=parsing.complete_devices)
@pass_settings
def preflight(settings: Settings, devices: tuple[str, ...]) -> None:
    """Prove each way from each device, or from DEVICES, by moving bytes through it."""
    verdicts = list(settings.node.preflight(*devices))
    if settings.json:
        output.print_json({"verdicts": verdicts})
    else:
        rows = [
            (
                verdict.device,
                verdict.fabric,
                verdict.path,
                "works" if verdict.works else "fails",
                format_duration(verdict.latency) if verdict.works else None,
                output.rate(verdict.bandwidth) if verdict.works else None,
                verdict.error.message if verdict.error else None,
            )
            for verdict in verdicts
        ]
        output.print_table(("DEVICE", "FABRIC", "PATH", "VERDICT", "LATENCY", "BANDWIDTH", "WHY"), rows)
    if not all(verdict.works for verdict in verdicts):
        raise click.exceptions.Exit(1)
