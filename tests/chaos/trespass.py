"""Chooses what a job tries that nobody may, and as whom.

Rules of this file:

* What is tried as another job needs jobs that are users of their own; else they are all one owner, who may.
* Whatever connection an attempt needs is closed with the `with` block.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from peermem.client.attach import Attachment
from tests.chaos import impostors
from tests.chaos.impostors import Bait
from tests.chaos.slots import SLOT
from tests.chaos.strangers import (
    Attempt,
    Caller,
    Reach,
    Victim,
    list_hidden,
    map_region,
    repeat_request,
    use_ended_session,
    use_session_over_tcp,
)


class Rumours:
    """What jobs tell each other of regions that are to be tried things on."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def tell(self, node: str, victim: Victim) -> None:
        """Tell the other jobs of a region of this one."""
        with self._path.open("a") as file:
            file.write(json.dumps({"node": node, "user": os.geteuid(), **asdict(victim)}) + "\n")

    def heard(self, node: str) -> Sequence[Victim]:
        """Return what others of other users told of a node."""
        found = []
        paths = self._path.parent.glob(f"*{self._path.suffix}")
        for path in sorted(paths, key=lambda path: path.stat().st_mtime):
            for line in path.read_text().splitlines():
                told = json.loads(line)
                if told.pop("node") == node and told.pop("user") != os.geteuid():
                    found.append(Victim(**told))
        return found


class Trespass:
    """One attempt."""

    def __init__(self, random: random.Random, home: Reach, asked: Reach, rumours: Rumours) -> None:
        """`home` is where the victim is, `asked` the node that is asked to move its bytes."""
        self._random = random
        self._home = home
        self._asked = asked
        self._rumours = rumours
        self._stack = ExitStack()

    def __enter__(self) -> Trespass:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def choose(self, victim: Victim, bait: Bait, nodes: Sequence[str]) -> tuple[str, Attempt]:
        """Return who tries what: on `victim`, which is of this job, on `bait`, or on another job's."""
        heard = self._rumours.heard(self._home.node)
        ways: list[Callable[[], tuple[str, Attempt]]] = [
            lambda: self._as_guest(victim),
            lambda: self._as_nobody(victim),
            lambda: self._with_sessions(),
            lambda: self._as_node(bait, nodes),
            lambda: self._as_node(bait, nodes),
        ]
        if heard:
            ways += [lambda: self._as_another_job(heard[-1], bait)] * 2
        return self._random.choice(ways)()

    def _as_guest(self, victim: Victim) -> tuple[str, Attempt]:
        here = Caller(self._stack.enter_context(self._home.over_tls("guest")))
        attempts = [*here.attempts(victim, self._random), Attempt("list regions", partial(list_hidden, here))]
        there = Caller(self._stack.enter_context(self._asked.over_tls("guest")))
        return "a guest", self._random.choice([*attempts, *self._through_asked(there, victim)])

    def _as_nobody(self, victim: Victim) -> tuple[str, Attempt]:
        here = Caller(self._stack.enter_context(self._home.local()))
        return "nobody", self._random.choice(here.attempts(_unshared(victim), self._random))

    def _as_another_job(self, victim: Victim, bait: Bait) -> tuple[str, Attempt]:
        victim = Victim(victim.region, False, victim.transfer, bait.region, victim.request_id)
        here = self._session(self._home)
        attempts = [
            *here.attempts(victim, self._random),
            Attempt("map a region", partial(map_region, self._home, victim.region)),
            Attempt("repeat a request", partial(repeat_request, here, victim.region, SLOT, victim.request_id)),
            *self._through_asked(self._session(self._asked), victim),
        ]
        return "another job", self._random.choice(attempts)

    def _session(self, reach: Reach) -> Caller:
        attachment = Attachment.open(reach.attach)
        self._stack.callback(attachment.close)
        return Caller(self._stack.enter_context(reach.local()), (("peermem-session", attachment.token),))

    def _through_asked(self, there: Caller, victim: Victim) -> Sequence[Attempt]:
        """Return moves that another node than the victim's is asked for."""
        if self._asked is self._home:
            return ()
        found = there.attempts(_unshared(victim), self._random)
        return [
            Attempt(f"{each.what} through another node", each.act) for each in found if each.what.startswith("move")
        ]

    def _with_sessions(self) -> tuple[str, Attempt]:
        attempts = (
            Attempt("use a session that has ended", partial(use_ended_session, self._home)),
            Attempt("use a session over TCP", partial(use_session_over_tcp, self._home)),
        )
        return "a thief", self._random.choice(attempts)

    def _as_node(self, bait: Bait, nodes: Sequence[str]) -> tuple[str, Attempt]:
        others = [node for node in nodes if node != self._home.node]
        self._random.shuffle(others)
        return "an impostor", self._random.choice(impostors.attempts(self._home, others, bait))


def _unshared(victim: Victim) -> Victim:
    return Victim(victim.region, False, victim.transfer, victim.mine, victim.request_id)
