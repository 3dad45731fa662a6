"""The words of the verbs fabric: what its files tell each other, without pyverbs.

The numbers are the kernel's and libibverbs' ABI (rdma-core, libibverbs/verbs.h), written out here because pyverbs
moved its enumerations between releases 58 and 59.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

MTUS = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
"""enum ibv_mtu in bytes."""


class Access(IntFlag):
    """enum ibv_access_flags."""

    LOCAL_WRITE = 1
    REMOTE_WRITE = 2
    REMOTE_READ = 4
    MW_BIND = 16
    ON_DEMAND = 64


class WrOpcode(IntEnum):
    """enum ibv_wr_opcode."""

    RDMA_WRITE = 0
    SEND_WITH_IMM = 3
    RDMA_READ = 4
    BIND_MW = 8


class WcStatus(IntEnum):
    """enum ibv_wc_status, as far as it is told apart."""

    SUCCESS = 0
    LOC_LEN_ERR = 1
    LOC_QP_OP_ERR = 2
    LOC_PROT_ERR = 4
    WR_FLUSH_ERR = 5
    MW_BIND_ERR = 6
    LOC_ACCESS_ERR = 8
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXC_ERR = 12
    RNR_RETRY_EXC_ERR = 13
    GENERAL_ERR = 21


class Word(IntEnum):
    """What an end says, in the upper 8 bits of a word; the lower 24 are a number."""

    ASK = 1
    """Answer with the same number."""
    ANSWER = 2
    BYE = 3
    """This end is closed."""


class AsyncEvent(IntEnum):
    """enum ibv_event_type, as far as it is acted on."""

    DEVICE_FATAL = 8
    PORT_ACTIVE = 9
    PORT_ERR = 10
    LID_CHANGE = 11
    GID_CHANGE = 18


class VerbsError(Exception):
    """A verb failed; `errno` is why, and 0 where the library does not say."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.errno = number


@dataclass(frozen=True, slots=True)
class PortState:
    """What a port says of itself."""

    active: bool
    mtu: int
    """Bytes."""
    lid: int
    ethernet: bool


@dataclass(frozen=True, slots=True)
class DeviceCaps:
    """What a device can do, as far as it matters here."""

    ports: int
    max_wr: int
    max_cqe: int
    reads_served: int
    """READs that a queue pair serves at the same time."""
    reads_sent: int
    """READs that a queue pair has outstanding."""
    windows: bool
    """Memory windows of type 2B."""
    window_ranges: bool
    """A window's range is checked; software NICs check that of its memory region alone."""
    on_demand: bool
    """Reliable connections may READ and WRITE memory that was registered on demand."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What packets carry for the routers and switches on their way."""

    hop_limit: int = 64
    """Routers that a packet passes, at most."""
    traffic_class: int = 0
    service_level: int = 0


@dataclass(frozen=True, slots=True)
class Path:
    """How packets of a reliable connection get to its other end."""

    port: int
    gid_index: int
    remote_gid: bytes
    remote_lid: int
    is_global: bool
    mtu: int
    marks: Marks


@dataclass(frozen=True, slots=True)
class Timing:
    """When a reliable connection tries again; in the verbs' own units (IBA 1.4, 9.7.5.2.8 and 9.7.6.1)."""

    timeout: int
    """An ACK is waited for 4.096 microseconds times 2 to this power."""
    retries: int
    """At most 6: rxe takes 7 for infinity."""
    rnr_retries: int
    min_rnr_timer: int


Piece = tuple[int, int, int, int, int]
"""One WRITE or READ work request: local address, length, lkey, remote address, rkey. A tuple, since there are many."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the verbs fabric behaves; times in seconds."""

    timing: Timing = Timing(timeout=16, retries=6, rnr_retries=7, min_rnr_timer=12)
    mtu: int = 4096
    """Bytes of payload in one packet, at most."""
    depth: int = 256
    """WRITEs and READs on one queue pair, at most."""
    marks: Marks = Marks()
    gid_index: int | None = None
    """The address of each port to use; None: chosen by type and subnet."""
    queue_pairs: int = 1
    """Per NIC port and link."""
    windows: bool = True
    """Whether grants are memory windows where the NIC has them; else each is a registration of its own."""
    extended: bool = True
    """Whether work is posted through the extended queue pair interface where the NIC has it."""
    connect_timeout: float = 5.0
    """From `accept` until the initiator has shown itself, and for an initiator to be answered."""
    stall_timeout: float = 10.0
    """How long a link may stand still."""
    ask_after: float = 1.0
    """How long nothing completes before the remote daemon is asked whether the link is still there, and how long a
    rail that was rebuilt may take to be answered."""
    keepalive: float = 10.0
    """Between two looks at whether the initiator of an accepted link is still there."""
    fence_timeout: float = 1.0
    """For the initiator to answer a fence before its rail is reset instead."""
