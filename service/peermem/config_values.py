"""The values of a configuration that are more than text and numbers: names, addresses, sizes, durations.

Rules of this file:

* Each class says in `expected` what it takes, and raises ValueError for anything else.
"""

from __future__ import annotations

import ipaddress
import mmap
import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import PurePosixPath
from typing import ClassVar, Self

from peermem.core.errors import InvalidField
from peermem.core.failpoints import FailOrder
from peermem.core.names import check_id
from peermem.core.spiffe import NodePattern
from peermem.core.units import parse_duration, parse_size


class Name(str):
    """The short name of a node or device."""

    __slots__ = ()
    expected: ClassVar[str] = "1 to 63 of a-z, 0-9 and -, starting with a letter and not ending with -"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        try:
            return super().__new__(cls, check_id(text, "name"))
        except InvalidField as error:
            raise ValueError(error.message) from None


class SocketPath(str):
    """A unix socket."""

    __slots__ = ()
    expected: ClassVar[str] = "an absolute path of at most 107 bytes"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not text.startswith("/") or "\0" in text or len(text.encode()) > 107:
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class FilePath(str):
    """A directory, file or block device."""

    __slots__ = ()
    expected: ClassVar[str] = "an absolute path without '..'"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        path = PurePosixPath(text)
        if not text.startswith("/") or text.startswith("//") or "\0" in text or ".." in path.parts:
            raise ValueError(cls.expected)
        return super().__new__(cls, str(path))


class NodeIds(str):
    """The SPIFFE IDs of nodes' certificates, with {node} for their short names."""

    __slots__ = ()
    expected: ClassVar[str] = (
        'a SPIFFE ID with {node} as a part of its path, such as "spiffe://example.org/peermem/{node}"'
    )

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        NodePattern(text)
        return super().__new__(cls, text)


class HttpsUrl(str):
    """Where an HTTPS server is."""

    __slots__ = ()
    expected: ClassVar[str] = 'https://HOST or https://HOST:PORT, such as "https://kubernetes.default.svc"'

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        found = re.fullmatch(r"https://([^/@:?#]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?/?", text, re.ASCII)
        if found is None or not Address._is_valid(f"{found[1]}{found[2] or ':443'}"):
            raise ValueError(cls.expected)
        return super().__new__(cls, text.rstrip("/"))


class CollectorUrl(str):
    """Where a collector of traces takes them, over gRPC."""

    __slots__ = ()
    expected: ClassVar[str] = 'http://HOST:PORT, or https:// for TLS, such as "http://127.0.0.1:4317"'

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        scheme, _, address = text.rstrip("/").partition("://")
        if scheme not in ("http", "https") or not Address._is_valid(address):
            raise ValueError(cls.expected)
        return super().__new__(cls, f"{scheme}://{address}")


class KubernetesNode(str):
    """The name of a node in Kubernetes."""

    __slots__ = ()
    expected: ClassVar[str] = "1 to 253 of a-z, 0-9, - and ., beginning and ending with a letter or digit"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", text, re.ASCII):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class TokenAudience(str):
    """Whom a token is issued for."""

    __slots__ = ()
    expected: ClassVar[str] = "1 to 253 printable characters without spaces"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not re.fullmatch(r"[!-~]{1,253}", text, re.ASCII):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class KeyPrefix(str):
    """What keys in etcd begin with."""

    __slots__ = ()
    expected: ClassVar[str] = 'parts of A-Z, a-z, 0-9, ., _ and -, each after a /, such as "/peermem/v1"'

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not re.fullmatch(r"(/[A-Za-z0-9._-]+){1,16}", text, re.ASCII) or len(text) > 255:
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class UserName(str):
    """A user of etcd."""

    __slots__ = ()
    expected: ClassVar[str] = "1 to 64 printable characters without spaces"

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not re.fullmatch(r"[!-~]{1,64}", text, re.ASCII):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class Address(str):
    """host:port of a server to connect to; the host is a name, an IPv4 or an [IPv6] address."""

    __slots__ = ()
    expected: ClassVar[str] = 'host:port with a port from 1 to 65535, such as "10.0.0.2:7470" or "[fd00::2]:7470"'
    lowest_port: ClassVar[int] = 1
    _HOST: ClassVar[re.Pattern[str]] = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not cls._is_valid(text):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)

    @classmethod
    def _is_valid(cls, text: str) -> bool:
        host, _, port = text.rpartition(":")
        if not re.fullmatch(r"0|[1-9]\d{0,4}", port, re.ASCII) or not cls.lowest_port <= int(port) <= 65535:
            return False
        if host.startswith("[") and host.endswith("]"):
            return isinstance(_ip(host[1:-1]), IPv6Address)
        looks_like_ipv4 = not host.strip("0123456789.")
        return isinstance(_ip(host), IPv4Address) if looks_like_ipv4 else bool(cls._HOST.fullmatch(host))

    @property
    def host(self) -> str:
        """Without brackets."""
        return self.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """0 for any free one."""
        return int(self.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        ip = _ip(self.host)
        return ip.is_loopback if ip else self.host == "localhost"

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every address of this host, so that no other host can use it."""
        ip = _ip(self.host)
        return bool(ip and ip.is_unspecified)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class HostName(str):
    """The name of a host, as browsers send it."""

    __slots__ = ()
    expected: ClassVar[str] = 'the name of a host in lower case, such as "gpu-01.example.org"'

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", text, re.ASCII):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class ListenAddress(Address):
    """host:port to serve on; port 0 takes any free one."""

    __slots__ = ()
    expected: ClassVar[str] = 'host:port with a port from 0 to 65535, such as "127.0.0.1:7470" or "[::1]:7470"'
    lowest_port: ClassVar[int] = 0


class PciAddress(str):
    """A PCI function."""

    __slots__ = ()
    expected: ClassVar[str] = 'a PCI address, such as "0000:41:00.0"'
    _FORM: ClassVar[re.Pattern[str]] = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]", re.ASCII)

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not cls._FORM.fullmatch(text):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class NicName(str):
    """An RDMA device, or one of its ports."""

    __slots__ = ()
    expected: ClassVar[str] = 'an RDMA device or one of its ports, such as "mlx5_0" or "mlx5_0/1"'
    _FORM: ClassVar[re.Pattern[str]] = re.compile(r"[A-Za-z0-9_.-]{1,63}(?:/[1-9]\d{0,2})?", re.ASCII)

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not cls._FORM.fullmatch(text):
            raise ValueError(cls.expected)
        return super().__new__(cls, text)


class Size(int):
    """Bytes. Subclasses set the bounds, and whether they are whole pages."""

    _bounds: ClassVar[tuple[int, int]]
    _step: ClassVar[int]
    expected: ClassVar[str]

    def __init_subclass__(cls, least: str, most: str, *, pages: bool = False) -> None:
        cls._bounds = parse_size(least), parse_size(most)
        cls._step = mmap.PAGESIZE if pages else 1
        cls.expected = f'a size from {least} to {most} in bytes, KiB, MiB, GiB or TiB, such as "64MiB"'
        if pages:
            cls.expected += f", in whole pages of {mmap.PAGESIZE} bytes"

    def __new__(cls, value: str | int) -> Self:
        """Raises ValueError."""
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(cls.expected)
        size = parse_size(value)
        if not cls._bounds[0] <= size <= cls._bounds[1] or size % cls._step:
            raise ValueError(cls.expected)
        return super().__new__(cls, size)


class Duration(float):
    """Seconds. Subclasses set the bounds."""

    _bounds: ClassVar[tuple[float, float]]
    expected: ClassVar[str]

    def __init_subclass__(cls, least: str, most: str) -> None:
        cls._bounds = parse_duration(least), parse_duration(most)
        cls.expected = f'a duration with its unit (ms, s, min, h, d) from {least} to {most}, such as "30s"'

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        if not isinstance(text, str):
            raise ValueError(cls.expected)
        seconds = parse_duration(text)
        if not cls._bounds[0] <= seconds <= cls._bounds[1]:
            raise ValueError(cls.expected)
        return super().__new__(cls, seconds)


class MessageSize(Size, least="64KiB", most="1GiB"):
    """Of one gRPC message."""


class AdoptSize(Size, least="0B", most="1024TiB"):
    """Of all memory that jobs hand in."""


class DeviceSize(Size, least="4KiB", most="1024TiB"):
    """Of a device."""


class BarOffset(Size, least="0B", most="1024TiB", pages=True):
    """Where a device begins in its BAR."""


class BarSize(Size, least="4KiB", most="1024TiB", pages=True):
    """Of a device in a BAR."""


class BlockSize(Size, least="4KiB", most="64MiB", pages=True):
    """What is read from storage or written to it at once."""


class AckTimeout(Duration, least="1ms", most="60s"):
    """Until a NIC sends again what was not acknowledged."""


class Wait(Duration, least="100ms", most="1h"):
    """Until something is given up."""


class LeaseTime(Duration, least="2s", most="10min"):
    """Of a node's lease in etcd, in whole seconds."""

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        seconds = super().__new__(cls, text)
        if seconds % 1:
            raise ValueError(cls.expected)
        return seconds


class Keep(Duration, least="0s", most="7d"):
    """How long something that nobody uses is kept."""


class Share(float):
    """A part of the whole."""

    __slots__ = ()
    expected: ClassVar[str] = "a number from 0.0 to 1.0"

    def __new__(cls, value: str | float) -> Self:
        """Raises ValueError."""
        if isinstance(value, bool) or not 0.0 <= float(value) <= 1.0:
            raise ValueError(cls.expected)
        return super().__new__(cls, value)


class Failpoint(str):
    """Something that is to go wrong."""

    __slots__ = ()
    expected: ClassVar[str] = FailOrder.EXPECTED

    def __new__(cls, text: str) -> Self:
        """Raises ValueError."""
        FailOrder.parse(text)
        return super().__new__(cls, text)
