from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab import plugs
from tests.lab.machine import monitor

REFUSAL: dict[str, object] = {"error": {"class": "DeviceNotFound", "desc": "Device 'nvme' not found"}}


@contextmanager
def machine(folder: Path, answer: dict[str, object]) -> Iterator[list[dict[str, object]]]:
    """Play a machine's monitor; yield the orders that it gets."""
    orders: list[dict[str, object]] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:

            def say(what: Mapping[str, object]) -> None:
                connection.sendall(f"{json.dumps(what)}\n".encode())

            say({"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}})
            while order := json.loads(connection.recv(65536) or b"{}"):  # the next one comes after the answer
                is_order = order["execute"] != "qmp_capabilities"
                if is_order:
                    orders.append({"execute": order["execute"], **order.get("arguments", {})})
                say((answer if is_order else {"return": {}}) | {key: order[key] for key in order if key == "id"})

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(monitor(folder)))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield orders
        thread.join(30)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("!pull nvme", [("device_del", "nvme")]),
        ("!plug nvme", [("device_add", "nvme")]),
        ("!plug ivshmem", [("object-del", "bar"), ("object-add", "bar"), ("device_add", "ivshmem")]),
    ],
)
def test_what_the_guest_asks_for_is_ordered(tmp_path: Path, line: str, expected: list[tuple[str, str]]) -> None:
    told: list[str] = []
    with machine(tmp_path, {"return": {}}) as orders:
        plugs.obey(line, tmp_path, told.append)
    assert [(order["execute"], order["id"]) for order in orders] == expected
    assert told == []


def test_what_the_machine_refuses_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    with machine(tmp_path, REFUSAL):
        plugs.obey("!pull nvme", tmp_path, told.append)
    assert told == ["The machine does not pull nvme: Device 'nvme' not found"]


@pytest.mark.parametrize("line", ["!", "!pull", "!pull disk", "!quit nvme", "!plug nvme now"])
def test_nothing_else_can_be_asked_for(tmp_path: Path, line: str) -> None:
    told: list[str] = []
    plugs.obey(line, tmp_path, told.append)
    assert told == [f"The guest asks for something that there is not: {line}"]


def test_a_machine_that_is_gone_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    plugs.obey("!pull nvme", tmp_path, told.append)
    assert told[0].startswith("The machine does not pull nvme: ")
