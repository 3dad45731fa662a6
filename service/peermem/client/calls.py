"""What both shells need to call a daemon: channel options and the session's metadata.

Rules of this file:

* The channel repeats idempotent calls by itself, once, and finds a restarted daemon within a second.
* A daemon whose host vanished is noticed within half a minute, so that no wait for a transfer is endless.
* A daemon is reached directly: the proxy that a host has for the web plays no part.
"""

from __future__ import annotations

import json
import os
from typing import Literal

from peermem.client import targets
from peermem.client.attach import Attachment
from peermem.client.requests import SERVICE_CONFIG
from peermem.client.tls import Tls, read_token
from peermem.core.errors import NotMappable

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
]

TIMEOUT = 30.0
"""Seconds that a call may take unless the program says otherwise."""

SLOWEST = 8 << 20
"""Bytes per second that reading or writing a region is allowed to sink to before its call times out."""


def open_attachment(
    target: str, attach: str | Literal[False] | None, timeout: float, tls: Tls | None
) -> Attachment | None:
    """Open the attach socket at `attach`; at None the one beside a local target, when it is there. Each request on it
    may take `timeout` seconds."""
    if attach is None:
        beside = targets.attach_path(target)
        attach = beside if beside and os.path.exists(beside) else False
    return Attachment.open(attach, timeout, read_token(tls)) if attach else None


def need_attachment(attachment: Attachment | None, target: str, verb: str) -> Attachment:
    """Return the attachment. Raises NotMappable where there is none."""
    if attachment is None:
        raise NotMappable(
            f"Memory can't be {verb} over {target}: the attach socket is not open. Connect to unix:///PATH of the "
            "daemon on this host, with attach.sock beside it.",
            target=target,
        )
    return attachment
