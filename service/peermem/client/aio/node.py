"""A daemon in the hands of an asyncio program: `peermem.aio.connect`.

Rules of this file:

* Thin: requests, facts, segments and faults are made in the pure modules beside it.
* The attach socket is local and quick, yet it blocks: it is used in a thread.
* A node object owns its channel, pipeline, renewal task and attach socket, and `close` ends them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

from peermem.client import calls, requests, targets, tensors
from peermem.client.aio.channel import Channel
from peermem.client.aio.region import Region
from peermem.client.aio.renewal import Renewal
from peermem.client.aio.transfer import Pipeline, Transfer
from peermem.client.attach import Attachment
from peermem.client.facts import Device, Lease, Nic, NodeInfo, PublishedRegion, TransferInfo, Verdict
from peermem.client.requests import Time
from peermem.client.segments import Plan, Segments, Side, explicit, full_name
from peermem.client.storage import StorageInfo, Watcher, load_request, store_request
from peermem.client.tls import Access, Tls
from peermem.core.types import FabricKind, LeaseKind
from peermem.v1 import node_pb2, region_pb2, transfer_pb2


class HasFileno(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Its file descriptor."""


async def connect(
    target: str | None = None,
    *,
    attach: str | Literal[False] | None = None,
    tls: Tls | None = None,
    timeout: Time = calls.TIMEOUT,
) -> Node:
    """Open a connection to the daemon at `target`: `unix:///path` or `host:port`.

    Without a target, PEERMEM_TARGET counts, then the socket of a daemon on this host. For a daemon on
    this host the attach socket is opened too, when it is there: regions can then be mapped, and those
    with the default lease are freed when this process ends. `attach` gives another path, or False for
    none. `tls` is what this program shows, and how it knows the daemon; without it the PEERMEM_CLIENT_
    variables count. `timeout` is for each single call. Raises NodeUnreachable, Unauthenticated.
    """
    chosen, limit = targets.resolve(target), requests.seconds(timeout) or calls.TIMEOUT
    proof = targets.proof(tls, chosen)
    attachment = await asyncio.to_thread(calls.open_attachment, chosen, attach, limit, proof)
    node = Node(chosen, attachment, limit, proof)
    try:
        node.name = (await node.info()).name
    except BaseException:
        await node.close()
        raise
    return node


class Node:
    """A connection to one daemon. Made by `peermem.aio.connect`; as an asynchronous context manager it closes."""

    name: str = ""
    """nodes/{node}."""

    def __init__(self, target: str, attachment: Attachment | None, timeout: float, tls: Tls | None = None) -> None:
        access = Access(target, tls, attachment.token if attachment else None)
        self.target = target
        self._attachment = attachment
        self._channel = Channel(target, access, timeout)
        self._pipeline = Pipeline(lambda: self._channel.transfers, access, target)
        self._renewal = Renewal(self.renew_leases)
        self._attached: dict[str, object] = {}
        """Tensors whose memory is a region."""

    def __repr__(self) -> str:
        return f"<Node {self.name} at {self.target}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection. The daemon frees the regions of its session; running transfers go on."""
        await self._renewal.close()
        await self._pipeline.close()
        await self._channel.close()
        if self._attachment is not None:
            await asyncio.to_thread(self._attachment.close)
        self._attached.clear()

    async def info(self, name: str = "") -> NodeInfo:
        """Return the facts of this node, or of the node `nodes/{node}`."""
        return NodeInfo.from_proto(
            await self._channel.unary(self._channel.nodes.GetNode, node_pb2.GetNodeRequest(name=name))
        )

    async def nodes(self) -> list[NodeInfo]:
        """Return the nodes that the directory knows, and those that left it lately, in order of their names."""
        request, found = node_pb2.ListNodesRequest(), list[NodeInfo]()
        while True:
            page = await self._channel.unary(self._channel.nodes.ListNodes, request)
            found += map(NodeInfo.from_proto, page.nodes)
            request.page_token = page.next_page_token
            if not request.page_token:
                return found

    async def devices(self) -> list[Device]:
        """Return the devices of this node."""
        answer = await self._channel.unary(self._channel.nodes.ListDevices, node_pb2.ListDevicesRequest())
        return [Device.from_proto(device) for device in answer.devices]

    async def nics(self) -> list[Nic]:
        """Return the NIC ports of this node."""
        answer = await self._channel.unary(self._channel.nodes.ListNics, node_pb2.ListNicsRequest())
        return [Nic.from_proto(nic) for nic in answer.nics]

    def preflight(self, *devices: str) -> AsyncIterator[Verdict]:
        """Check the node, its NIC ports, and each device, or those named, with each NIC port by moving a pattern both
        ways; tell each finding as it comes. Raises DeviceNotFound.
        """
        verdicts = self._channel.preflight(node_pb2.PreflightRequest(devices=devices))
        return (Verdict.from_proto(verdict) async for verdict in verdicts)

    async def create_region(
        self,
        *,
        device: str,
        length: int | str,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        lease: str | float | None = None,
        publish: bool = False,
        request_id: str | None = None,
    ) -> Region:
        """Allocate a region on `device`, zeroed.

        `lease` is `session` (freed when this process ends; the default with an attach socket), `none`
        (until it is deleted; the default without) or a time to live such as `30s`, which is renewed
        while this node object is open. With `publish` it is found on all nodes (`find_regions`): its name, length,
        labels, path and kind of device are then known to every identified client of every node.
        """
        return await self._create(
            requests.create_region(
                device=device,
                length=length,
                name=name,
                labels=labels,
                lease=lease,
                publish=publish,
                request=request_id,
            )
        )

    async def adopt(
        self,
        file: int | HasFileno,
        *,
        length: int | str = 0,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        lease: str | float | None = None,
        publish: bool = False,
        request_id: str | None = None,
    ) -> Region:
        """Make a region of a memfd or a dma-buf of this process; without `length`, of all of it.

        Raises NotMappable without an attach socket, NotAdoptable for a file that can't become a region.
        """
        attachment = calls.need_attachment(self._attachment, self.target, "handed in")
        fd = file if isinstance(file, int) else file.fileno()
        token, _ = await asyncio.to_thread(attachment.hand_in, fd)
        return await self._create(
            requests.create_region(
                adopted=token,
                length=length,
                name=name,
                labels=labels,
                lease=lease,
                publish=publish,
                request=request_id,
            )
        )

    async def attach(
        self,
        tensor: object,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        lease: str | float | None = None,
        publish: bool = False,
        request_id: str | None = None,
    ) -> Region:
        """Make a region of a tensor's or array's memory, of any library that speaks DLPack or the CUDA array interface.

        On a GPU that this node has as a device it may be any contiguous tensor; in host memory it has to be at the
        start of a memory file that is open in this process. This object keeps the tensor until the region is
        deleted or the connection is closed. Work on the GPU that writes it has to be complete before bytes are
        moved. Raises NotAdoptable, DeviceNotFound, NotMappable without an attach socket.
        """
        calls.need_attachment(self._attachment, self.target, "attached")
        found = tensors.memory_of(tensor)
        if isinstance(found, tensors.HostFile):
            region = await self.adopt(
                found.fd,
                length=found.length,
                name=name,
                labels=labels,
                lease=lease,
                publish=publish,
                request_id=request_id,
            )
        else:
            gpu = requests.gpu_memory(found, await self.devices())
            region = await self._create(
                requests.create_region(
                    gpu=gpu,
                    length=found.length,
                    name=name,
                    labels=labels,
                    lease=lease,
                    publish=publish,
                    request=request_id,
                )
            )
        self._attached[region.name] = tensor
        return region

    async def region(self, name: str) -> Region:
        """Return one region of this node, by its whole name or the last part."""
        request = region_pb2.GetRegionRequest(name=full_name(name, self.name))
        return self._bound(await self._channel.unary(self._channel.regions.GetRegion, request))

    async def regions(self, labels: Mapping[str, str] | None = None) -> AsyncIterator[Region]:
        """Iterate over the regions of this node that carry all these labels, in order of their names."""
        request = region_pb2.ListRegionsRequest(labels=labels or {})
        while True:
            page = await self._channel.unary(self._channel.regions.ListRegions, request)
            for region in page.regions:
                yield self._bound(region)
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def find_regions(self, labels: Mapping[str, str] | None = None) -> AsyncIterator[PublishedRegion]:
        """Iterate over the published regions of all nodes that carry all these labels, in order of node and region.

        Raises DirectoryUnreachable, AccessDenied.
        """
        request = region_pb2.FindRegionsRequest(labels=labels or {})
        while True:
            page = await self._channel.unary(self._channel.regions.FindRegions, request)
            for region in page.regions:
                yield PublishedRegion.from_proto(region)
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def delete_region(self, name: str, *, force: bool = False) -> None:
        """End a region; with `force` also when transfers use it, which then fail with RegionDeleted."""
        request = region_pb2.DeleteRegionRequest(
            name=full_name(name, self.name), request_id=requests.request_id(), force=force
        )
        await self._channel.unary(self._channel.regions.DeleteRegion, request)
        self._renewal.drop(request.name)
        self._attached.pop(request.name, None)

    async def renew_leases(self, names: Sequence[str]) -> list[Lease]:
        """Move the ends of leases with a time to live into the future: of all these regions or none."""
        request = region_pb2.RenewLeaseRequest(names=names)
        answer = await self._channel.unary(self._channel.regions.RenewLease, request)
        return [Lease.from_proto(lease) for lease in answer.leases]

    async def map_region(self, name: str) -> memoryview:
        """Return all bytes of a region, writable and without a copy. Raises NotMappable."""
        attachment = calls.need_attachment(self._attachment, self.target, "mapped")
        return memoryview(await asyncio.to_thread(attachment.map, full_name(name, self.name)))

    async def read_region(self, name: str, offset: int, length: int) -> bytes:
        """Return bytes of a region."""
        if length == 0:
            return b""  # to the daemon, zero means all
        return await self._channel.read(requests.read_region(full_name(name, self.name), offset, length))

    async def write_region(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes into a region."""
        await self._channel.write(full_name(name, self.name), offset, data)

    async def load_region(
        self,
        name: str,
        path: str,
        *,
        offset: int = 0,
        length: int | None = None,
        file_offset: int | str = 0,
        checksum: bool = False,
        progress: Watcher | None = None,
        request_id: str | None = None,
    ) -> StorageInfo:
        """Load a file or block device of the node into a region, see Region.load."""
        whole = full_name(name, self.name)
        request = load_request(
            whole, path, offset=offset, length=length, file_offset=file_offset, checksum=checksum, request=request_id
        )
        return await self._channel.storage(self._channel.regions.LoadRegion, request, progress)

    async def store_region(
        self,
        name: str,
        path: str,
        *,
        offset: int = 0,
        length: int | None = None,
        file_offset: int | str | None = None,
        checksum: bool = False,
        progress: Watcher | None = None,
        request_id: str | None = None,
    ) -> StorageInfo:
        """Store a region into a file or block device of the node, see Region.store."""
        whole = full_name(name, self.name)
        request = store_request(
            whole, path, offset=offset, length=length, file_offset=file_offset, checksum=checksum, request=request_id
        )
        return await self._channel.storage(self._channel.regions.StoreRegion, request, progress)

    async def transfer(
        self,
        src: Side | None = None,
        dst: Side | None = None,
        *,
        segments: Segments | None = None,
        timeout: Time | None = None,
        checksum: bool = False,
        fabric: FabricKind | str | None = None,
        request_id: str | None = None,
    ) -> Transfer:
        """Ask for bytes to be moved and return at once; `wait` on what is returned for the outcome.

        `src` and `dst` are a region, a slice of one, a region's name, or lists of these with equal
        totals; a name alone takes the length of the other side. Many ranges are better given as
        `segments`: tuples (source region, offsets, destination region, offsets, lengths), or Strided.
        The transfer fails with Timeout after `timeout`. With `checksum` what arrived is compared with
        what was sent before success is reported. Raises SegmentsMismatch, ZeroLength, InvalidField.
        """
        packed = await self._segments(src, dst) if segments is None else explicit(segments, self.name)
        return self._pipeline.start(
            requests.create_transfer(packed, timeout=timeout, checksum=checksum, fabric=fabric, request=request_id)
        )

    async def transfers(self, *, running: bool = False) -> AsyncIterator[TransferInfo]:
        """Iterate over the transfers of this node, newest first; with `running` only those that have not ended."""
        request = transfer_pb2.ListTransfersRequest(running=running)
        while True:
            page = await self._channel.unary(self._channel.transfers.ListTransfers, request)
            for transfer in page.transfers:
                yield TransferInfo.from_proto(transfer)
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    async def get_transfer(self, name: str) -> TransferInfo:
        """Return one transfer of this node, `nodes/{node}/transfers/{transfer}`."""
        request = transfer_pb2.GetTransferRequest(name=name)
        return TransferInfo.from_proto(await self._channel.unary(self._channel.transfers.GetTransfer, request))

    async def cancel_transfer(self, name: str) -> TransferInfo:
        """Cancel a transfer that anyone started; afterwards no byte of it is written any more, anywhere."""
        request = transfer_pb2.CancelTransferRequest(name=name)
        return TransferInfo.from_proto(await self._channel.unary(self._channel.transfers.CancelTransfer, request))

    async def _segments(self, src: Side | None, dst: Side | None) -> list[transfer_pb2.SegmentList]:
        plan = Plan(src, dst, self.name)
        return plan.segments({name: (await self.region(name)).length for name in plan.unknown})

    async def _create(self, request: region_pb2.CreateRegionRequest) -> Region:
        region = self._bound(await self._channel.unary(self._channel.regions.CreateRegion, request))
        if region.lease.kind is LeaseKind.TTL and region.lease.ttl:
            self._renewal.add(region.name, region.lease.ttl)
        return region

    def _bound(self, region: region_pb2.Region) -> Region:
        return Region.from_proto(region, _node=self)
