"""Containers without an engine. Rules of this file:

* A container is a root filesystem, read-only, in namespaces of its own for mounts, names and IPC, on the network of who
  starts it, with /dev and /sys of the machine and one folder that is shared at its own path.
* What runs in it is the process that was started: signals and exit codes are its own.
"""

from __future__ import annotations

from pathlib import Path

USER = 7470
"""The image's own."""

_ENTER = """
set -e
root=$1 shared=$2 user=$3 capabilities=$4; shift 4
mount --bind "$root" "$root"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mkdir -p "$root$shared"
chown -R "$user:$user" "$shared"
mount --bind "$shared" "$root$shared"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -o bind,remount,ro "$root"
exec chroot "$root" setpriv --reuid="$user" --regid="$user" --clear-groups --inh-caps=-all \\
    --bounding-set="$capabilities" --no-new-privs "$@"
"""


def container(root: Path, shared: Path, *, user: int = USER, capabilities: str = "-all") -> tuple[str, ...]:
    """Return what a command is handed to, to run in a container; `capabilities` are in setpriv's words."""
    alone = ("unshare", "--mount", "--ipc", "--uts", "--propagation=private")
    return (*alone, "sh", "-c", _ENTER, "container", str(root), str(shared), str(user), capabilities)
