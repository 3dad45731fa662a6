"""Every fault that a caller can meet: one class per reason, each with its canonical code.

Rules of this file:

* A reason is the class name in UPPER_SNAKE_CASE; `protos/peermem/v1/error.proto` lists the same ones.
* The message is for people: one or two sentences with the object, the cause and the fix.
* The metadata is for programs: names and numbers of the message, never a key or a secret.
* Faults of foreign libraries are turned into these where the library is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import ClassVar, Self

DOMAIN = "peermem"


class Code(IntEnum):
    """Canonical gRPC codes (google.rpc.Code) that peermem uses."""

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class PeermemError(Exception):
    """A fault with a reason. Catch a subclass for one reason, this class for all.

    Attributes:
        code: the canonical gRPC code.
        reason: why, in UPPER_SNAKE_CASE.
        message: one or two sentences for people.
        metadata: names and numbers for programs.
    """

    code: ClassVar[Code] = Code.UNKNOWN
    reason: ClassVar[str] = "UNKNOWN"
    by_reason: ClassVar[dict[str, type[PeermemError]]] = {}

    def __init__(self, message: str, /, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: Mapping[str, str] = {key: str(value) for key, value in metadata.items()}

    def __init_subclass__(cls, code: Code) -> None:
        cls.code = code
        cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()
        PeermemError.by_reason[cls.reason] = cls

    def again(self) -> Self:
        """Return the same fault anew, to raise what is kept: an error that is raised keeps, in its traceback, all that
        its callers were about, and each time more of it."""
        return type(self)(self.message, **self.metadata)

    def bare(self) -> Self:
        """Let go of where it was raised and why, to be kept; return itself."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)

    @staticmethod
    def restore(reason: str, message: str, metadata: Mapping[str, str]) -> PeermemError:
        """Return the fault that another process described; an unknown reason becomes `Internal`."""
        return PeermemError.by_reason.get(reason, Internal)(message, **metadata)


class InvalidField(PeermemError, code=Code.INVALID_ARGUMENT):
    """A field is missing, malformed or outside its range."""


class OutOfRange(PeermemError, code=Code.INVALID_ARGUMENT):
    """A range is not inside its region."""


class ZeroLength(PeermemError, code=Code.INVALID_ARGUMENT):
    """A region or segment of zero bytes was asked for."""


class SegmentsMismatch(PeermemError, code=Code.INVALID_ARGUMENT):
    """Sources and destinations differ in number or total."""


class SegmentsOverlap(PeermemError, code=Code.INVALID_ARGUMENT):
    """A destination overlaps another destination or a source of the same transfer."""


class NoCommonNode(PeermemError, code=Code.INVALID_ARGUMENT):
    """No single node holds the source or the destination of every segment."""


class WrongNode(PeermemError, code=Code.INVALID_ARGUMENT):
    """The resource belongs to another node, which must be asked instead."""


class MalformedMessage(PeermemError, code=Code.INVALID_ARGUMENT):
    """Bytes on the attach socket, a fabric port or in a gRPC request are not of the protocol."""


class RegionNotFound(PeermemError, code=Code.NOT_FOUND):
    """This node has no such region."""


class TransferNotFound(PeermemError, code=Code.NOT_FOUND):
    """This node has no such transfer, or has forgotten it since it ended."""


class DeviceNotFound(PeermemError, code=Code.NOT_FOUND):
    """This node has no such device."""


class NodeNotFound(PeermemError, code=Code.NOT_FOUND):
    """The directory knows no such node."""


class NodeNameTaken(PeermemError, code=Code.ALREADY_EXISTS):
    """Another daemon is in the directory under this node's name."""


class DirectoryUnreachable(PeermemError, code=Code.UNAVAILABLE):
    """The directory can't be reached, or refuses this daemon."""


class LinkNotFound(PeermemError, code=Code.NOT_FOUND):
    """No such link is open."""


class SessionNotFound(PeermemError, code=Code.NOT_FOUND):
    """The session, or the file descriptor handed in over it, is unknown."""


class RegionExists(PeermemError, code=Code.ALREADY_EXISTS):
    """A region of this name exists."""


class RequestIdReused(PeermemError, code=Code.ALREADY_EXISTS):
    """This request_id was used for a request of other content."""


class AccessDenied(PeermemError, code=Code.PERMISSION_DENIED):
    """The caller may not do this with that resource."""


class Unauthenticated(PeermemError, code=Code.UNAUTHENTICATED):
    """The caller did not prove who it is, or not by anything that counts here (any more)."""


class RegionInUse(PeermemError, code=Code.FAILED_PRECONDITION):
    """A transfer uses the region, so it can't be deleted without force."""


class RegionDeleted(PeermemError, code=Code.FAILED_PRECONDITION):
    """The region was deleted or its lease ended while a transfer used it."""


class RegionRevoked(PeermemError, code=Code.FAILED_PRECONDITION):
    """The device took the region's memory back."""


class NotMappable(PeermemError, code=Code.FAILED_PRECONDITION):
    """The region can't be mapped by a local job."""


class LeaseNotRenewable(PeermemError, code=Code.FAILED_PRECONDITION):
    """The region's lease is of a kind that isn't renewed."""


class FabricUnavailable(PeermemError, code=Code.FAILED_PRECONDITION):
    """The fabric asked for does not serve this pair of regions."""


class StaleEpoch(PeermemError, code=Code.FAILED_PRECONDITION):
    """A link or grant of an earlier run of a daemon was used."""


class NotAdoptable(PeermemError, code=Code.FAILED_PRECONDITION):
    """The file descriptor handed in can't become a region."""


class PyverbsMissing(PeermemError, code=Code.FAILED_PRECONDITION):
    """pyverbs can't be imported, or does not fit the node's libibverbs."""


class NicNotFound(PeermemError, code=Code.FAILED_PRECONDITION):
    """The node has no (such) RDMA NIC in the daemon's network namespace."""


class NicForbidden(PeermemError, code=Code.FAILED_PRECONDITION):
    """The daemon may not open the NIC's device file under /dev/infiniband."""


class NicLost(PeermemError, code=Code.UNAVAILABLE):
    """The NIC's driver reported a fatal error, or the NIC was removed."""


class PortDown(PeermemError, code=Code.FAILED_PRECONDITION):
    """The NIC's port is not active."""


class NoGid(PeermemError, code=Code.FAILED_PRECONDITION):
    """The NIC's port has no address (GID) that links could use."""


class MemlockTooSmall(PeermemError, code=Code.RESOURCE_EXHAUSTED):
    """The daemon may not lock as much memory as the registration needs."""


class OnDemandMissing(PeermemError, code=Code.FAILED_PRECONDITION):
    """The NIC, its driver or the kernel can't register memory on demand, which is how p2pmem is reached."""


class RegistrationRefused(PeermemError, code=Code.FAILED_PRECONDITION):
    """The kernel or the NIC refused to register the memory."""


class DmaBufUnsupported(PeermemError, code=Code.FAILED_PRECONDITION):
    """The NIC can't import the dma-buf, or its exporter refuses the NIC."""


class GpuDriverMissing(PeermemError, code=Code.FAILED_PRECONDITION):
    """The GPU's driver, or the Python package that calls it, can't be loaded."""


class GpuFailed(PeermemError, code=Code.FAILED_PRECONDITION):
    """The GPU's driver refused a call."""


class ProbeFailed(PeermemError, code=Code.FAILED_PRECONDITION):
    """The memory was registered, and then the NIC could not access it."""


class ProbeMismatch(PeermemError, code=Code.DATA_LOSS):
    """The NIC moved bytes without an error, and they were not the right ones."""


class PathUnsupported(PeermemError, code=Code.FAILED_PRECONDITION):
    """The PCI topology or the kernel does not let the NIC reach the device."""


class DeviceLost(PeermemError, code=Code.FAILED_PRECONDITION):
    """The device is not on the node (any more), or it is off."""


class BarClaimed(PeermemError, code=Code.FAILED_PRECONDITION):
    """A kernel driver holds the BAR, so it can't be mapped."""


class KernelLockedDown(PeermemError, code=Code.FAILED_PRECONDITION):
    """Kernel lockdown forbids to map BARs."""


class DeviceForbidden(PeermemError, code=Code.FAILED_PRECONDITION):
    """The daemon may not open the device's file."""


class KernelTooOld(PeermemError, code=Code.FAILED_PRECONDITION):
    """The running kernel lacks an interface that the device needs."""


class DeviceFull(PeermemError, code=Code.RESOURCE_EXHAUSTED):
    """The device has too little memory left."""


class LimitReached(PeermemError, code=Code.RESOURCE_EXHAUSTED):
    """A limit of the daemon is reached."""


class QuotaExceeded(PeermemError, code=Code.RESOURCE_EXHAUSTED):
    """A limit of the caller's tenant is reached."""


class NodeUnreachable(PeermemError, code=Code.UNAVAILABLE):
    """The remote node can't be reached, or its link broke."""


class AuthorityUnreachable(PeermemError, code=Code.UNAVAILABLE):
    """What has to say whose token a caller shows could not be asked."""


class GrantRefused(PeermemError, code=Code.UNAVAILABLE):
    """The remote node refused an access because the grant had ended."""


class ShuttingDown(PeermemError, code=Code.UNAVAILABLE):
    """The daemon is shutting down."""


class Timeout(PeermemError, code=Code.DEADLINE_EXCEEDED):
    """A timeout passed."""


class TransferCancelled(PeermemError, code=Code.CANCELLED):
    """The transfer was cancelled by a caller."""


class ChecksumMismatch(PeermemError, code=Code.DATA_LOSS):
    """The CRC32C at the destination differs from the source's."""


class StorageForbidden(PeermemError, code=Code.PERMISSION_DENIED):
    """The file is in no directory that loads and stores may use, or the daemon may not open it."""


class FileNotFound(PeermemError, code=Code.NOT_FOUND):
    """There is no such file."""


class FileUnusable(PeermemError, code=Code.FAILED_PRECONDITION):
    """It is neither a file nor a block device, or something else uses it."""


class FileTooShort(PeermemError, code=Code.OUT_OF_RANGE):
    """The file or block device ends before the range that was asked for does."""


class StorageFull(PeermemError, code=Code.RESOURCE_EXHAUSTED):
    """The file can't grow: the disk, a quota or the limit of a file's size is reached."""


class StorageFailed(PeermemError, code=Code.DATA_LOSS):
    """The storage failed to read or write."""


class Internal(PeermemError, code=Code.INTERNAL):
    """A defect; the daemon's log has the details."""


class NotSupported(PeermemError, code=Code.UNIMPLEMENTED):
    """There is no such call or feature."""
