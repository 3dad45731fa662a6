"""What a program shows to a daemon, and how it knows the daemon: certificates and tokens, from files.

Rules of this file:

* Files are read again when they have changed, because others renew them: a token for the next call, certificates for a
  new channel. One that can't be read then, or holds no token, leaves what was read before.
* A token is never sent where others could read it: over TLS or a unix socket only.
* What is no token is not given to gRPC, which calls it a fault of the daemon, or raises an error of its own.
* Keys and tokens are in no repr and no error.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from peermem.core.errors import InvalidField

File: TypeAlias = "str | os.PathLike[str]"
Metadata: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """Files that prove who this program and a daemon are; for `peermem.connect`."""

    ca: File | None = None
    """PEM: the authorities that sign daemons' certificates. Needed for a daemon that is reached over TCP."""
    certificate: File | None = None
    """PEM: this program's certificate; with its key."""
    key: File | None = None
    """PEM."""
    token_file: File | None = None
    """A service account's token, for a daemon's grpc.token_address or unix socket."""
    server: str = ""
    """A name in the daemon's certificate; empty for the host that is connected to."""

    def check(self, target: str) -> None:
        """Return where this will do for a target. Raises InvalidField."""
        if bool(self.certificate) != bool(self.key):
            missing = "key" if self.certificate else "certificate"
            raise InvalidField(
                f"tls.{missing} is missing: certificate and key belong together.", field=f"tls.{missing}"
            )
        if not self.ca and not target.startswith("unix:"):
            raise InvalidField(
                f"tls.ca is missing: without it, who answers at {target} could be anybody, and others could read what "
                "is sent. Name the file of the authorities.",
                field="tls.ca",
            )


class Access:
    """What is shown now, to one target. May be used in any thread."""

    def __init__(self, target: str, tls: Tls | None, session: str | None) -> None:
        """`session` is the token of a session of the attach socket. Raises InvalidField."""
        if tls is not None:
            tls.check(target)
        self._session: Metadata = (("peermem-session", session),) if session else ()
        self._lock = threading.Lock()
        self._token = _token_of(tls)
        encrypting = tls if tls is not None and not target.startswith("unix:") else Tls()
        pair = (encrypting.ca, encrypting.certificate, encrypting.key)
        self._pair = _Files([file for file in pair if file], "tls")
        name = encrypting.server
        self.options: list[tuple[str, str | int]] = [("grpc.ssl_target_name_override", name)] if name else []
        """For the channel."""

    def metadata(self) -> Metadata:
        """Return what goes along with a call."""
        with self._lock:
            self._token.refresh()
            token = self._token.text()
        return (*self._session, ("authorization", f"Bearer {token}")) if token else self._session

    def renewed(self) -> bool:
        """Whether certificates are others than when `credentials` was asked, so that a new channel is needed."""
        with self._lock:
            return self._pair.refresh()

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return what a channel shows; None for one in the plain."""
        if not self._pair.contents:
            return None
        root, *pair = self._pair.contents
        certificate, key = pair or (None, None)
        return grpc.ssl_channel_credentials(root, key, certificate)


class _Files:
    """The contents of some files."""

    def __init__(self, paths: list[File], field: str, check: Callable[[bytes], None] = lambda _: None) -> None:
        """`check` raises ValueError for contents that are none. Raises InvalidField."""
        self._paths = paths
        self._check = check
        self._state = self._look()
        try:
            self.contents = self._read()
        except OSError as error:
            # without its name: who takes the token itself for the file's name must not find it in an error
            raise InvalidField(f"A file that {field} names can't be read: {error.strerror}.", field=field) from None
        except ValueError as error:
            raise InvalidField(f"The file that {field} names {error}", field=field) from None

    def refresh(self) -> bool:
        """Read them again if one has changed; return whether there is something new."""
        state = self._look()
        if state == self._state:
            return False
        try:
            contents = self._read()
        except (OSError, ValueError):
            return False  # about to be replaced; looked at again by the next call
        before, self._state, self.contents = self.contents, state, contents
        return contents != before

    def text(self) -> str:
        """Return what they hold, as one text."""
        return b"".join(self.contents).decode("ascii", "replace").strip()

    def _read(self) -> list[bytes]:
        contents = []
        for path in self._paths:
            with open(path, "rb") as file:
                contents.append(file.read(_LARGEST))
            self._check(contents[-1])
        return contents

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_state_of(path) for path in self._paths]


def _token_of(tls: Tls | None) -> _Files:
    return _Files([tls.token_file] if tls and tls.token_file else [], "tls.token_file", _check_token)


def _check_token(data: bytes) -> None:
    if not re.fullmatch(rb"[!-~]+", token := data.strip()) or len(token) > _LONGEST_TOKEN:
        raise ValueError(
            "holds no token, which is one line of visible ASCII characters. Name the one that Kubernetes projects."
        )


def read_token(tls: Tls | None) -> str:
    """Return the service account's token that its file holds now; empty for none. Raises InvalidField."""
    return _token_of(tls).text()


def _state_of(path: File) -> tuple[int, int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


_LARGEST = 1 << 20
"""Bytes of one file."""
_LONGEST_TOKEN = 12_000
"""Bytes: daemons take none that is longer."""
