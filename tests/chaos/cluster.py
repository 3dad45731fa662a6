"""The daemons of a run, the wires between them, and what they hold.

Rules of this file:

* Every daemon reaches every other one only over wires: one for each pair's gRPC, one for each node's tcp fabric.
* They know each other by certificates, and each has a policy.
* Times are short, and little is remembered of what ended, so that what is given up is given up within a run, and what
  grows is seen; nothing else differs from a real daemon.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from bench.daemons import Daemon, Place, free_ports

import peermem
from tests.chaos.history import Governed, Record
from tests.chaos.policies import BROKEN, OPEN, Certificates, policy
from tests.chaos.proxy import Mode, Network, Wire, network
from tests.e2e.support import eventually, holdings, metric

LIMIT = 60
"""Regions of one daemon."""
EXTRA = f"""\
break_on_purpose = true
[[device]]
name = "bar0"
size = "1GiB"
[region]
max_regions = {LIMIT}
[transfer]
grant_ttl = "6s"
retry_for = "3s"
link_idle = "1s"
keep_ended = 200
[shutdown]
grace = "2s"
[audit]
decisions = "denied"
"""
ENVIRON = {"PEERMEM_TCP_STALL_TIMEOUT": "500ms"}
_RELOAD = 30.0
"""Seconds in which a policy is put in force."""
_EXPECTED = re.compile('"policy_refused"|"certificate_refused"')
"""What a daemon says of a policy that is broken on purpose, and of a certificate whose key is about to be written."""
_DEFECT = re.compile(r'_defect|Traceback|"level": "(error|critical)"')


class Cluster:
    """Daemons and wires."""

    def __init__(
        self, folder: Path, nodes: Sequence[str], wires: Network, failpoints: Sequence[str], *, is_open: bool
    ) -> None:
        """`failpoints` are those of the first start. With `is_open` no policy holds, and it is told as if one did."""
        self.record = Record(folder / "daemons.history")
        self.certificates = Certificates(folder / "tls", tuple(nodes))
        self._folder = folder
        self._is_open = is_open
        self._guests_read = dict.fromkeys(nodes, True)
        ports = {node: free_ports(3) for node in nodes}
        self.fabric: dict[str, Wire] = {node: wires.wire(f"127.0.0.1:{ports[node][1]}") for node in nodes}
        """By the node that they lead to."""
        self.control: dict[tuple[str, str], Wire] = {
            (here, there): wires.wire(f"127.0.0.1:{ports[there][0]}")
            for here in nodes
            for there in nodes
            if here != there
        }
        self.daemons: dict[str, Daemon] = {}
        self.baselines: dict[str, dict[str, float]] = {}
        self.defects: list[str] = []
        """Lines of logs that tell of a defect."""
        for node in nodes:
            others = {there: self.control[node, there].address for there in nodes if there != node}
            here = Place(config=f'{self.certificates.table(node)}\n[policy]\nfile = "{self._policy_file(node)}"')
            self.daemons[node] = Daemon(node, folder / node, ports[node], others, EXTRA, here)
            self._write_policy(node, self._policy(node))
            self.start(node, failpoints)

    def start(self, node: str, failpoints: Sequence[str]) -> None:
        """Start a daemon that breaks as it is told."""
        daemon = self.daemons[node]
        told = ", ".join(f'"{each}"' for each in failpoints)
        daemon.environ = {
            **ENVIRON,
            "PEERMEM_TCP_ADVERTISE": self.fabric[node].address,
            "PEERMEM_FAILPOINTS": f"[{told}]",
        }
        daemon.start()

    def targets(self) -> dict[str, dict[str, str]]:
        """Return where jobs reach the daemons."""
        return {
            node: {
                "socket": daemon.target,
                "attach": f"{daemon.folder}/attach.sock",
                "tcp": daemon.grpc,
                "fabric": daemon.tcp,
            }
            for node, daemon in self.daemons.items()
        }

    def _policy_file(self, node: str) -> Path:
        return self._folder / f"policy-{node}.toml"

    def _policy(self, node: str) -> str:
        return OPEN if self._is_open else policy(guests_read=self._guests_read[node])

    def _write_policy(self, node: str, text: str) -> None:
        fresh = self._folder / f"policy-{node}.new"
        fresh.write_text(text)
        fresh.rename(self._policy_file(node))

    def change_policy(self, node: str) -> None:
        """Let guests of a node read what they could not, or the other way round, and see it in force."""
        self.record.add(Governed, node=node, guests_read=None)
        self._guests_read[node] = not self._guests_read[node]
        if self._put_policy(node, self._policy(node), "peermem_policy_loaded_timestamp_seconds"):
            self._govern(node)

    def break_policy(self, node: str) -> None:
        """Put a file with an error in a policy's place, see it refused, and put it right again."""
        self._put_policy(node, BROKEN, "peermem_policy_reload_failures_total")
        self._put_policy(node, self._policy(node), "peermem_policy_loaded_timestamp_seconds")

    def _put_policy(self, node: str, text: str, metric_that_grows: str) -> bool:
        """Have a daemon read another policy, and return whether it has: one that dies meanwhile reads it when it starts
        again."""
        self._write_policy(node, text)
        try:
            before = metric(self.daemons[node], metric_that_grows)
            self.signal(node, signal.SIGHUP)
            eventually(lambda: metric(self.daemons[node], metric_that_grows) > before, "the policy", _RELOAD)
        except OSError:
            return False
        return True

    def _govern(self, node: str) -> None:
        self.record.add(Governed, node=node, guests_read=self._guests_read[node])

    def isolate(self, node: str, mode: Mode) -> None:
        """Have nothing pass to and from a node that is not on a connection that it made to another one's fabric."""
        self.fabric[node].set(Mode.BULK_LATE if mode is Mode.LATE else mode)
        for pair, wire in self.control.items():
            if node in pair:
                wire.set(mode)

    def heal(self) -> None:
        """Open all wires."""
        for wire in (*self.fabric.values(), *self.control.values()):
            wire.set(Mode.OPEN)

    def is_dead(self, node: str) -> bool:
        """Whether a daemon's process has ended."""
        process = self.daemons[node].process
        return process is None or process.poll() is not None

    def signal(self, node: str, number: signal.Signals) -> None:
        """Send a signal to a daemon that may have died by itself."""
        if not self.is_dead(node):
            os.kill(self.daemons[node].pid, number)

    def holds(self, node: str) -> dict[str, float]:
        """Return what a daemon holds. Raises PeermemError, OSError while it can't say."""
        daemon = self.daemons[node]
        with peermem.connect(daemon.target, attach=False, timeout="5s") as client:
            held = {what: float(str(count)) for what, count in holdings(daemon, client).items()}
            held["links"] = float(client.info().link_count)
        return held

    def memory(self, node: str) -> tuple[int, int]:
        """Return the resident bytes of a daemon that are its own, and its descriptors."""
        process = Path(f"/proc/{self.daemons[node].pid}")
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) << 10, len(list((process / "fd").iterdir()))

    def settle(self, node: str, patience: float) -> dict[str, float]:
        """Wait until a daemon that nobody uses holds what it held at its start, or the patience is over; return what
        it holds."""
        held: dict[str, float] = {}

        def empty() -> bool:
            held.update(self.holds(node))
            return all(count <= self.baselines[node].get(what, 0.0) for what, count in held.items())

        with suppress(AssertionError):  # what is left is told
            eventually(empty, "the end of what a daemon holds", patience)
        return held

    def ready(self) -> None:
        """Wait for all daemons, and note what they hold when nobody has used them."""
        for node, daemon in self.daemons.items():
            daemon.ready()
            self.baselines[node] = self.holds(node)
            self._govern(node)

    def end(self) -> None:
        """End the daemons, and look for defects in their logs."""
        for node, daemon in self.daemons.items():
            self.signal(node, signal.SIGCONT)
            daemon.kill()
            lines = daemon.log.read_text().splitlines()
            self.defects += [f"{node}: {line}" for line in lines if _DEFECT.search(line) and not _EXPECTED.search(line)]


@contextmanager
def cluster(
    folder: Path, nodes: Sequence[str] = ("a", "b", "c"), failpoints: Sequence[str] = (), *, is_open: bool = False
) -> Iterator[Cluster]:
    """Run daemons for the time of a block."""
    with ExitStack() as stack:
        made = Cluster(folder, nodes, stack.enter_context(network()), failpoints, is_open=is_open)
        stack.callback(made.record.close)
        stack.callback(made.end)
        made.ready()
        yield made
