"""The part of the composition root that makes the directory, and says what this node tells of itself there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from peermem.config import Config
from peermem.config import Etcd as EtcdConfig
from peermem.core.node import NodeFacts
from peermem.directory.base import Directory, NodeEntry, Status
from peermem.directory.etcd import EtcdDirectory, Settings
from peermem.directory.etcd_connection import Proof
from peermem.directory.static import StaticDirectory

_MACHINE_ID = Path("/etc/machine-id")


def make_directory(config: Config) -> Directory:
    """Return the directory, not opened yet."""
    if config.directory.kind == "static":
        return StaticDirectory(config.directory.nodes)
    etcd = config.directory.etcd
    return EtcdDirectory(
        Settings(
            endpoints=etcd.endpoints,
            prefix=etcd.prefix,
            cluster=etcd.cluster,
            lease=etcd.lease,
            max_published=etcd.max_published,
            machine=_machine(),
            proof=_proof(etcd),
        )
    )


def own_entry(facts: NodeFacts, address: str) -> NodeEntry:
    """Return what this node says of itself; `address` is where others reach it."""
    return NodeEntry(
        node=facts.node,
        address=address,
        epoch=facts.epoch,
        version=facts.version,
        fabrics=facts.fabrics,
        nics=facts.nics,
        devices=facts.devices,
    )


def notes_of(status: Status) -> tuple[str, ...]:
    """Return what is wrong with the directory without keeping the daemon from work."""
    if status.away_for is None or status.problem is None:
        return ()
    known = "Known nodes stay as they were told last, and new ones are not seen."
    return (f"The directory has been away for {status.away_for:.0f} s. {known} {status.problem.message}",)


def why_unknown(config: Config, directory: Directory) -> str:
    """Return what the directory knows instead of a node, and what to do about it: the end of a sentence."""
    known = sorted(directory.nodes())
    names = ", ".join(known[:_NAMED]) + (f" and {len(known) - _NAMED} more" if len(known) > _NAMED else "")
    if config.directory.kind == "static":
        return f"which knows {names or 'none'}. Add it to directory.nodes."
    away = directory.status().away_for
    if away is not None:
        return f"which has been away for {away:.0f} s and knew {names or 'none'} then. See /readyz."
    cluster = config.directory.etcd.cluster
    return f"where cluster {cluster} has {names or 'none'}. Start its daemon, or see in its log why it can't join."


def _proof(etcd: EtcdConfig) -> Proof:
    ca, certificate, key, password = (
        Path(file) if file else None for file in (etcd.ca, etcd.certificate, etcd.key, etcd.password_file)
    )
    return Proof(ca, certificate, key, etcd.user or "", password)


def _machine() -> str:
    """Return what tells this host's installation from another one. Its id itself is not for others to know."""
    try:
        text = _MACHINE_ID.read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(f"peermem {text}".encode()).hexdigest()[:16] if text else ""


_NAMED = 16
