"""Unix socket paths: take one that is free or left behind by a dead daemon, never a live one's."""

from __future__ import annotations

import socket
import stat
from pathlib import Path


def free_socket_path(path: Path, kind: socket.SocketKind) -> None:
    """Make `path` ready to be bound: its folder exists, and no socket of a dead daemon is in the way.

    `kind` is the type of the socket to bind. Raises OSError when a daemon is listening there, or when
    something else than a socket is at the path.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(f"{path} exists and is no socket. Move it away, or configure another path.")
    with socket.socket(socket.AF_UNIX, kind) as trial:
        trial.settimeout(1.0)
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # its daemon died without removing it
            return
        except OSError as error:
            raise OSError(f"{path} can't be checked for a listening daemon: {error.strerror}.") from error
    raise OSError(f"Another daemon is listening on {path}. Stop it, or configure another path.")
