"""Commands about what a node is and has: node, nodes, devices, nics."""

from __future__ import annotations

import click

from peermem.cli import output
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
