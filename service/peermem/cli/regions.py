"""Commands about regions: list, find, show, create, delete, put, get, load, store.

Rules of this file:

* A region of another node is reached at the address that the asked daemon names.
* `put` and `get` move files of this host through the tool, in pieces, so that progress shows and memory stays small;
  `load` and `store` have the region's daemon move files of its own host.
"""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from time import monotonic

import click

import peermem
from peermem.cli import output, parsing
from peermem.cli.options import pass_settings
from peermem.cli.settings import Settings
from peermem.client.segments import Operand
from peermem.core.errors import OutOfRange, RegionNotFound
from peermem.core.units import format_duration, format_size

_PIECE = 4 << 20

_name = click.argument("name", shell_complete=parsing.complete_regions)
_label = click.option(
    "-l",
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    callback=parsing.labels,
    help="A label; may be repeated.",
)


@click.group()
def regions() -> None:
    """List, create, fill, read, load, store and delete regions.

    REGION is nodes/NODE/regions/REGION, or its last part for a region of the asked node.
    """


_slurm_job = click.option("--slurm-job", metavar="ID", help="Only regions that this Slurm job made.")


@regions.command("list")
@_label
@_slurm_job
@pass_settings
def list_regions(settings: Settings, labels: dict[str, str], slurm_job: str | None) -> None:
    """List the node's regions, or those with all these labels."""
    found = [region for region in settings.node.regions(labels) if slurm_job in (None, region.slurm_job)]
    if settings.json:
        output.print_json({"regions": found})
        return
    rows = [
        (
            region.name,
            format_size(region.length),
            region.device,
            region.path,
            region.state,
            _lease(region),
            region.owner,
        )
        for region in found
    ]
    output.print_table(("NAME", "LENGTH", "DEVICE", "PATH", "STATE", "LEASE", "OWNER"), rows)


@regions.command()
@_label
@pass_settings
def find(settings: Settings, labels: dict[str, str]) -> None:
    """Find published regions on all nodes, or those with all these labels."""
    found = list(settings.node.find_regions(labels))
    if settings.json:
        output.print_json({"regions": found})
        return
    rows = [(each.name, format_size(each.length), each.device_kind, each.path, each.labels) for each in found]
    output.print_table(("NAME", "LENGTH", "DEVICE KIND", "PATH", "LABELS"), rows)


@regions.command()
@_name
@pass_settings
def show(settings: Settings, name: str) -> None:
    """Show one region."""
    _print(settings, settings.at_owner(lambda node: node.region(name)))


@regions.command()
@click.option("--device", required=True, shell_complete=parsing.complete_devices, help="Where to allocate.")
@click.option("--length", required=True, type=parsing.SIZE, help="Bytes, such as 64MiB.")
@click.option("--name", help="Last part of the region's name; else the daemon picks one.")
@_label
@click.option("--lease", default="none", show_default=True, help="none, or a time to live such as 10min.")
@click.option("--publish", is_flag=True, help="Have it be found on all nodes, see regions find.")
@pass_settings
def create(
    settings: Settings,
    device: str,
    length: int,
    name: str | None,
    labels: dict[str, str],
    lease: str,
    publish: bool,
) -> None:
    """Allocate a region, zeroed. It lives until it is deleted, unless --lease says otherwise."""
    if lease == "session":
        raise click.BadParameter("a session ends with this command; use none or a time to live.", param_hint="--lease")
    node = settings.node
    made = node.create_region(device=device, length=length, name=name, labels=labels, lease=lease, publish=publish)
    _print(settings, made)


@regions.command()
@click.argument("names", nargs=-1, shell_complete=parsing.complete_regions)
@click.option("--force", is_flag=True, help="Also when transfers use it; they fail.")
@_slurm_job
@pass_settings
def delete(settings: Settings, names: tuple[str, ...], force: bool, slurm_job: str | None) -> None:
    """Delete regions: those named, or with --slurm-job all that a Slurm job has left on the asked node."""
    if bool(names) is (slurm_job is not None):
        raise click.UsageError("Name regions, or a Slurm job by --slurm-job.")
    if slurm_job is not None:
        names = tuple(region.name for region in settings.node.regions() if region.slurm_job == slurm_job)
    for name in names:
        with suppress(RegionNotFound) if slurm_job is not None else nullcontext():  # it has ended by itself
            settings.at_owner(lambda node, name=name: node.delete_region(name, force=force))  # type: ignore[misc]
    if settings.json:
        output.print_json({"deleted": names})


@regions.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.argument("region", type=parsing.RANGE, shell_complete=parsing.complete_regions)
@pass_settings
def put(settings: Settings, file: str, region: Operand) -> None:
    """Copy FILE (- for stdin) into REGION, or into REGION:OFFSET+LENGTH."""
    whole, offset, room = settings.at_owner(lambda node: _located(node, region))
    size = None if file == "-" else Path(file).stat().st_size
    if size is not None and size > room:
        raise _too_long(whole, offset, room)
    done, began = 0, monotonic()
    with click.open_file(file, "rb") as source, output.Meter(f"put {whole.name}", settings.json) as meter:
        while piece := source.read(_PIECE):
            if done + len(piece) > room:
                raise _too_long(whole, offset, room)
            whole.write(piece, offset + done)
            done += len(piece)
            meter.show(done, size, done / (monotonic() - began))
    _print_copied(settings, whole.name, done, monotonic() - began)


@regions.command()
@click.argument("region", type=parsing.RANGE, shell_complete=parsing.complete_regions)
@click.argument("file", type=click.Path(dir_okay=False, writable=True, allow_dash=True))
@pass_settings
def get(settings: Settings, region: Operand, file: str) -> None:
    """Copy REGION, or REGION:OFFSET+LENGTH, into FILE (- for stdout)."""
    whole, offset, length = settings.at_owner(lambda node: _located(node, region))
    began = monotonic()
    with output.Meter(f"get {whole.name}", settings.json) as meter, click.open_file(file, "wb") as sink:
        for done in range(0, length, _PIECE):
            piece = whole.read(offset + done, min(_PIECE, length - done))
            sink.write(piece)
            meter.show(done + len(piece), length, (done + len(piece)) / (monotonic() - began))
    if file != "-":
        _print_copied(settings, whole.name, length, monotonic() - began)


_file_offset = click.option("--file-offset", type=parsing.SIZE, help="First byte in FILE, such as 4MiB.")
_checksum = click.option("--checksum", is_flag=True, help="Read both again and compare before success is reported.")


@regions.command()
@click.argument("file", type=click.Path())
@click.argument("region", type=parsing.RANGE, shell_complete=parsing.complete_regions)
@_file_offset
@_checksum
@pass_settings
def load(settings: Settings, file: str, region: Operand, file_offset: int | None, checksum: bool) -> None:
    """Have REGION's node load its own FILE, or a block device, into REGION or REGION:OFFSET+LENGTH.

    FILE is in a directory that the daemon's configuration allows (storage.directories). Interrupting the command ends
    the load.
    """
    whole, offset, length = settings.at_owner(lambda node: _located(node, region))
    with output.Meter(f"load {whole.name}", settings.json) as meter:
        info = whole.load(
            os.path.abspath(file),
            offset=offset,
            length=length if isinstance(region, peermem.Slice) else None,
            file_offset=file_offset or 0,
            checksum=checksum,
            progress=meter.follow,
        )
    _print_storage(settings, whole.name, info)


@regions.command()
@click.argument("region", type=parsing.RANGE, shell_complete=parsing.complete_regions)
@click.argument("file", type=click.Path())
@_file_offset
@_checksum
@pass_settings
def store(settings: Settings, region: Operand, file: str, file_offset: int | None, checksum: bool) -> None:
    """Have REGION's node store REGION, or REGION:OFFSET+LENGTH, into its own FILE or a block device.

    FILE is in a directory that the daemon's configuration opens to stores (storage.directories). It is made, or
    replaced as a whole; with --file-offset an existing one is written in place. Interrupting the command ends the
    store.
    """
    whole, offset, length = settings.at_owner(lambda node: _located(node, region))
    with output.Meter(f"store {whole.name}", settings.json) as meter:
        info = whole.store(
            os.path.abspath(file),
            offset=offset,
            length=length,
            file_offset=file_offset,
            checksum=checksum,
            progress=meter.follow,
        )
    _print_storage(settings, whole.name, info)


def _located(node: peermem.Node, region: Operand) -> tuple[peermem.Region, int, int]:
    """Return a region, and the offset and length of the range of it that was named."""
    if isinstance(region, peermem.Slice):
        return node.region(region.region), region.offset, region.length
    found = node.region(region if isinstance(region, str) else region.name)
    return found, 0, found.length


def _too_long(region: peermem.Region, offset: int, room: int) -> OutOfRange:
    return OutOfRange(
        f"The input is longer than the {room} bytes of {region.name} from {offset} on; cut it, or use a larger region.",
        region=region.name,
        offset=offset,
        length=room,
    )


def _print(settings: Settings, region: peermem.Region) -> None:
    if settings.json:
        output.print_json(region)
        return
    output.print_facts(
        {
            "name": region.name,
            "length": format_size(region.length),
            "device": region.device,
            "path": region.path,
            "nics": region.nics,
            "why": region.why,
            "state": region.state,
            "lease": _lease(region),
            "owner": region.owner,
            "labels": region.labels,
            "slurm job": region.slurm_job,
            "pod": region.pod,
            "published": "yes" if region.published else "no",
            "created": region.create_time,
        }
    )


def _print_copied(settings: Settings, name: str, length: int, seconds: float) -> None:
    if settings.json:
        output.print_json({"region": name, "bytes": length, "duration": seconds})
    else:
        speed = output.rate(length / seconds)
        click.echo(f"{name}: {format_size(length)} in {format_duration(seconds)}, {speed}", err=True)


def _print_storage(settings: Settings, name: str, info: peermem.StorageInfo) -> None:
    if settings.json:
        output.print_json({"region": name, **output.plain(info), "bandwidth": info.bandwidth})
        return
    output.print_facts(
        {
            "region": name,
            "bytes": format_size(info.bytes_done),
            "duration": format_duration(info.duration),
            "bandwidth": output.rate(info.bandwidth),
            "way": info.way,
            "why": info.why,
            "crc32c": f"{info.crc32c:08x}" if info.crc32c is not None else None,
        }
    )


def _lease(region: peermem.Region) -> str | None:
    if region.lease.ttl is not None:
        return f"{format_duration(region.lease.ttl)} until {output.cell(region.lease.expire_time)}"
    return region.lease.kind.value if region.lease.kind else None
