"""What jobs try that no policy allows, or only some: as guests, as nobody, as another job, and as a node taken over.

Rules of this file:

* An attempt returns when it reached what it tried for, and raises what it was refused with. What got no answer is
  neither.
* Nobody tries what it may do: a node that was taken over speaks of others' clients and uses others' links.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from peermem import errors
from peermem.client.attach import Attachment
from peermem.client.errors import from_call, from_proto
from peermem.v1 import region_pb2, region_pb2_grpc, transfer_pb2, transfer_pb2_grpc

GUEST = "spiffe://example.org/job/guest"
SHARED = {"shared": "yes"}
"""Labels of regions that guests may read where the policy lets them."""
TIMEOUT = 2.0
_REFUSALS = (
    errors.AccessDenied,
    errors.Unauthenticated,
    errors.RegionNotFound,
    errors.TransferNotFound,
    errors.SessionNotFound,
    errors.LinkNotFound,
    errors.QuotaExceeded,
)


class Reach:
    """Where a node is reached, and by what."""

    def __init__(self, node: str, target: Mapping[str, str], files: Path) -> None:
        self.node = node
        self.socket = target["socket"]
        self.attach = target["attach"]
        self.tcp = target["tcp"]
        self.fabric = target["fabric"]
        self._files = files

    @contextmanager
    def local(self) -> Iterator[grpc.Channel]:
        """Connect to the unix socket."""
        with grpc.insecure_channel(self.socket) as channel:
            yield channel

    @contextmanager
    def over_tls(self, who: str) -> Iterator[grpc.Channel]:
        """Connect as a guest, or as a node."""
        folder = self._files / who
        ca, key, certificate = ((folder / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem"))
        options = (("grpc.ssl_target_name_override", "peermem.test"),)
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        with grpc.secure_channel(self.tcp, credentials, options=options) as channel:
            yield channel


@dataclass(frozen=True, slots=True)
class Victim:
    """What an attempt is on."""

    region: str
    is_shared: bool
    transfer: str
    """One of the same owner; empty for none."""
    mine: str
    """A region of who tries it; empty for none."""
    request_id: str
    """Which made the region; empty where that is not known."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something to try."""

    what: str
    act: Callable[[], object]
    hinges: bool = False
    """Whether the policy of the moment decides, else none allows it."""


def outcome_of(act: Callable[[], object]) -> tuple[str, str]:
    """Return what came of an attempt, and the reason of a refusal: refused, reached or unanswered."""
    try:
        act()
    except grpc.RpcError as error:
        found: errors.PeermemError = from_call(error, "the daemon")  # type: ignore[arg-type]
    except errors.PeermemError as error:
        found = error
    except OSError:
        return "unanswered", ""
    else:
        return "reached", ""
    return ("refused" if isinstance(found, _REFUSALS) else "unanswered"), found.reason


Metadata = Sequence[tuple[str, str]]


class Caller:
    """Calls of RegionService and TransferService as somebody."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata = ()) -> None:
        self._regions: Any = region_pb2_grpc.RegionServiceStub(channel)
        self._transfers: Any = transfer_pb2_grpc.TransferServiceStub(channel)
        self._told: Mapping[str, Any] = {"timeout": TIMEOUT, "metadata": tuple(metadata)}

    def attempts(self, victim: Victim, random: random.Random) -> Sequence[Attempt]:
        """Return what can be tried on a victim."""
        name = victim.region
        found = [
            Attempt("read a region", lambda: self.read(name), victim.is_shared),
            Attempt("look at a region", lambda: self.get(name), victim.is_shared),
            Attempt("write a region", lambda: self.write(name)),
            Attempt("delete a region", lambda: self.delete(name)),
            Attempt("renew a region's lease", lambda: self.renew(name)),
            Attempt("make a region", self.make),
            Attempt("guess a region's name", lambda: self.get(f"{name[:-3]}{random.randrange(1000):03}")),
            Attempt("move bytes within a region", lambda: self.move(name, name)),
        ]
        if victim.transfer:
            found += [
                Attempt("cancel a transfer", lambda: self.cancel(victim.transfer)),
                Attempt("look at a transfer", lambda: self.watch(victim.transfer)),
            ]
        if victim.mine:
            found = [each for each in found if each.what != "make a region"]
            found += [
                Attempt("move bytes out of a region", lambda: self.move(name, victim.mine)),
                Attempt("move bytes into a region", lambda: self.move(victim.mine, name)),
            ]
        return found

    def read(self, name: str) -> None:
        list(self._regions.ReadRegion(region_pb2.ReadRegionRequest(name=name, length=64), **self._told))

    def get(self, name: str) -> None:
        self._regions.GetRegion(region_pb2.GetRegionRequest(name=name), **self._told)

    def write(self, name: str) -> None:
        chunk = region_pb2.WriteRegionRequest(name=name, data=b"trespassed")
        self._regions.WriteRegion(iter([chunk]), **self._told)

    def delete(self, name: str) -> None:
        self._regions.DeleteRegion(region_pb2.DeleteRegionRequest(name=name, force=True), **self._told)

    def renew(self, name: str) -> None:
        self._regions.RenewLease(region_pb2.RenewLeaseRequest(names=[name]), **self._told)

    def make(self, length: int = 4096, request_id: str = "") -> str:
        request = region_pb2.CreateRegionRequest(device="bar0", length=length, labels=SHARED, request_id=request_id)
        made: region_pb2.Region = self._regions.CreateRegion(request, **self._told)
        return made.name

    def move(self, source: str, destination: str) -> None:
        """Move a few bytes. Raises why it failed; TimeoutError while it has not ended."""
        one = transfer_pb2.SegmentList(source=source, destination=destination)
        one.ranges.source_offsets.append(0)
        one.ranges.destination_offsets.append(128)
        one.ranges.lengths.append(64)
        request = transfer_pb2.CreateTransferRequest(segments=[one], wait=Duration(seconds=2))
        moved: transfer_pb2.Transfer = self._transfers.CreateTransfer(request, **self._told)
        if moved.HasField("error"):
            raise from_proto(moved.error)
        if moved.state != transfer_pb2.TRANSFER_STATE_SUCCEEDED:
            with suppress(grpc.RpcError):
                self.cancel(moved.name)
            raise TimeoutError

    def cancel(self, name: str) -> None:
        self._transfers.CancelTransfer(transfer_pb2.CancelTransferRequest(name=name), **self._told)

    def watch(self, name: str) -> None:
        self._transfers.GetTransfer(transfer_pb2.GetTransferRequest(name=name), **self._told)

    def list(self) -> Sequence[region_pb2.Region]:
        answer = self._regions.ListRegions(region_pb2.ListRegionsRequest(), **self._told)
        return list(answer.regions)


def list_hidden(caller: Caller) -> None:
    """List regions. Raises AccessDenied where only shared ones are shown."""
    if all(region.labels.get("shared") for region in caller.list()):
        raise errors.AccessDenied("Only what is shared was shown.")


def map_region(reach: Reach, name: str) -> None:
    """Map a region in a session of this process's own."""
    attachment = Attachment.open(reach.attach)
    try:
        attachment.map(name).close()
    finally:
        attachment.close()


def use_ended_session(reach: Reach) -> None:
    """Make a region with the token of a session that has ended."""
    attachment = Attachment.open(reach.attach)
    token = attachment.token
    attachment.close()
    with reach.local() as channel:
        caller = Caller(channel, (("peermem-session", token),))
        for _ in range(100):  # the daemon has to notice the end first
            caller.delete(caller.make())


def use_session_over_tcp(reach: Reach) -> None:
    """Make a region with a session's token that was stolen, from elsewhere."""
    attachment = Attachment.open(reach.attach)
    try:
        with reach.over_tls("guest") as channel:
            Caller(channel, (("peermem-session", attachment.token),)).make()
    finally:
        attachment.close()


def repeat_request(caller: Caller, victim: str, length: int, request_id: str) -> None:
    """Repeat another's request, to be told of what it made. Raises AccessDenied where something else was made."""
    made = caller.make(length, request_id)
    if made != victim:
        caller.delete(made)
        raise errors.AccessDenied("The repetition was a request of its own.")
