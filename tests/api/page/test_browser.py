"""The page as Chromium shows it: of real daemons, and of a machine with NICs whose broker is real."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path as File
from typing import Any

import pytest
import pytest_asyncio
from bench.daemons import Daemon, daemons

import peermem
from peermem.api.http import Health
from peermem.api.page import document as documents
from peermem.broker.broker import Broker
from peermem.directory.base import NodeEntry
from tests.api.page.doubled import shown
from tests.broker.support import outcome, region, start, whole
from tests.chromium import BINARY, Tab, browser
from tests.doubles import Host
from tests.policies import rule, tenant

pytestmark = [
    pytest.mark.skipif(BINARY is None, reason="Chromium is missing: install the package chromium"),
    pytest.mark.asyncio(loop_scope="module"),
]

SLOW = rule("all", "anyone anyone@*", "read write manage create") + tenant(
    "slow", "anyone", "bytes_per_second = '8MiB'"
)
HOSTILE = {"x": "<script>document.title='owned'</script>", "y": "<img src=x onerror=\"document.title='owned'\">"}
DEVICE = '[[device]]\nname = "bar0"\nsize = "256MiB"\n'


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """Real daemons that let every job move 8 MiB a second."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "policy.toml").write_text(SLOW)
    with daemons(folder, ("a", "b"), DEVICE, {"PEERMEM_POLICY_FILE": str(folder / "policy.toml")}) as nodes:
        yield nodes


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Tab]:
    async with browser() as tab:
        yield tab


@pytest_asyncio.fixture(loop_scope="module")
async def tab(chromium: Tab) -> Tab:
    """The browser's tab, in which nothing is shown and nothing has gone wrong yet."""
    await chromium.open("about:blank")
    await chromium.until("location.href === 'about:blank'")
    chromium.complaints.clear()
    return chromium


async def shows(tab: Tab, text: str, where: str = "main") -> None:
    await tab.until(f"document.querySelector({where!r})?.innerText.includes({text!r})")


async def test_what_real_daemons_do(pair: dict[str, Daemon], tab: Tab) -> None:
    await tab.look(1400)
    await tab.open(f"http://{pair['a'].http}/")
    await shows(tab, "No region yet.", "#regions")
    await shows(tab, "ready", "#head")
    with peermem.connect(pair["a"].target) as a, peermem.connect(pair["b"].target) as b:
        source = a.create_region(device="bar0", length="64MiB", name="outbox", labels=HOSTILE)
        target = b.create_region(device="bar0", length="64MiB", name="inbox")
        await shows(tab, "outbox", "#regions")
        await shows(tab, HOSTILE["y"], "#regions")
        moving = a.transfer(source, target)
        await shows(tab, "outbox → b/inbox", "#transfers table")
        first = await tab.until("document.querySelector('#transfers progress')?.value")
        await tab.until(f"document.querySelector('#transfers progress')?.value > {first}")
        await shows(tab, "MiB/s", "#transfers td.number")
        await shows(tab, "opened tcp", "#nodes")
        moving.cancel()
        await shows(tab, "cancelled", "#transfers .ended")
        source.delete()
        await shows(tab, "No region yet.", "#regions")
        target.delete()
    assert await tab.run("document.title") == "a · peermem"
    assert await tab.run("document.querySelectorAll('#regions script, #regions img').length") == 0
    assert await tab.run("document.querySelectorAll('.uplot canvas').length") == 3
    assert tab.complaints == []


async def test_the_verdict_of_each_pair_is_drawn_and_told(tmp_path: File, tab: Tab) -> None:
    async with shown("gpu_server", tmp_path) as it:
        await it.prove("gpu0", "bar0")
        await tab.look(1600)
        await tab.open(it.url)
        await tab.until("document.querySelectorAll('.cell').length === 100")
        kinds = {
            kind: await tab.run(f"document.querySelectorAll('.cell.{kind}').length")
            for kind in ("good", "fair", "bad", "off", "down")
        }
        assert kinds == {"good": 20, "fair": 7, "bad": 0, "off": 63, "down": 10}
        cell = "document.querySelector('[data-pair=\"gpu0|mlx5_4/1\"]')"
        assert "works, by copies" in await tab.run(f"{cell}.getAttribute('aria-label')")
        await tab.run(f"{cell}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
        await shows(tab, "gpu0 and mlx5_4/1", "#inspector")
        await shows(tab, "PROBE_FAILED", "#inspector")
        assert await tab.run("document.querySelectorAll('.box.root.on').length") == 2
        await tab.run(f"{cell}.focus()")
        await tab.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
        await tab.until("document.activeElement.dataset.pair === 'gpu0|mlx5_11/1'")
        await shows(tab, "PORT_DOWN", "#inspector")
        assert tab.complaints == []


async def test_a_pair_that_fails_by_every_path(tmp_path: File, tab: Tab) -> None:
    async with shown("gpu_server", tmp_path) as it:
        it.refuse_everything()
        await it.prove("gpu0")
        await tab.look(1600)
        await tab.open(it.url)
        await tab.until("document.querySelectorAll('.cell.bad').length === 9")
        await shows(tab, "fails", "#inspector")
        assert await tab.run("document.querySelector('.cell.bad text').textContent") == "✕ DMABUF"


async def test_it_fits_a_narrow_window_and_knows_the_dark(tmp_path: File, tab: Tab) -> None:
    async with shown("gpu_server", tmp_path) as it:
        for at in range(20):
            await region(it.host, 4096, f"r{at}")
        await tab.look(400)
        await tab.open(it.url)
        await tab.until("document.querySelectorAll('#regions tbody tr').length === 20")
        assert await tab.run("document.documentElement.scrollWidth") == 400
        back = "getComputedStyle(document.body).backgroundColor"
        light = await tab.run(back)
        await tab.look(400, dark=True)
        assert await tab.run(back) != light
        await tab.until("document.querySelectorAll('.uplot').length === 3")
        assert tab.complaints == []


async def test_nothing_else_runs_in_it(tmp_path: File, tab: Tab) -> None:
    async with shown("", tmp_path) as it:
        await tab.look(1400)
        await tab.open(it.url)
        await shows(tab, "No region yet.", "#regions")
        with pytest.raises(RuntimeError, match="TrustedHTML"):
            await tab.run("document.querySelector('#regions').innerHTML = '<b>x</b>'")
        assert tab.complaints != []
        for word, script in (
            ("style", "Object.assign(document.createElement('style'), {textContent: '* {color: red}'})"),
            ("connect", "fetch('http://127.0.0.2:1/').catch(() => '')"),
            ("image", "Object.assign(new Image(), {src: 'http://127.0.0.2:1/x.png'})"),
        ):
            tab.complaints.clear()
            await tab.run(f"document.body.append({script}); new Promise((done) => setTimeout(done, 50))")
            assert any("Content Security Policy" in each and word in each for each in tab.complaints), word


async def test_a_daemon_that_is_gone_is_told(tmp_path: File, tab: Tab) -> None:
    async with shown("", tmp_path) as it:
        await tab.look(1400)
        await tab.open(it.url)
        await shows(tab, "No RDMA NIC is seen here", "#nics")
        it.health.append(Health(False, ("The daemon is shutting down.",)))
        await shows(tab, "The daemon is shutting down.", "#banner")
        await it.server.close()
        await shows(tab, "The daemon does not answer", "#banner")
        assert await tab.run("document.body.className") == "stale"


async def test_numbers_are_as_people_write_them(tmp_path: File, tab: Tab) -> None:
    async with shown("", tmp_path) as it:
        await tab.open(it.url)
        await shows(tab, "No region yet.", "#regions")
        words = "import('/page/words.js').then(({time}) => [0.00009949, 0.0000996, 0.0997, 0.1, 99.7, 100.4].map(time))"
        assert await tab.run(words) == ["99 µs", "100 µs", "100 ms", "100 ms", "100 s", "100 s"]


async def test_of_many_nodes_the_one_of_a_link_is_not_told_to_be_unknown(
    tmp_path: File, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "NODES", 1)
    brokers: dict[str, Broker] = {}
    async with shown("", tmp_path, brokers=brokers) as it, AsyncExitStack() as stack:
        other = Host("z", brokers, {})
        await other.open(stack)
        await it.host.directory.join(NodeEntry("z", "z.test:1"))
        await outcome(await start(it.host, whole(await region(it.host, 4096), await region(other, 4096))))
        await tab.look(1400)
        await tab.open(it.url)
        await shows(tab, "opened tcp", "#nodes")
        await shows(tab, "z.test:1", "#nodes")
        assert "not in the directory" not in await tab.run("document.querySelector('#nodes').innerText")


async def test_loads_of_parts_of_one_file_have_a_row_each(tmp_path: File, tab: Tab) -> None:
    async with shown("", tmp_path) as it:
        part = {"order": "load", "region": "one", "file": "/data/one", "done": 1, "total": 4, "way": "DIRECT"}
        made = it.page.facts
        assert made is not None

        async def facts() -> Mapping[str, Any]:
            return {**await made(), "files": [part | {"owner": f"uid:{number}"} for number in range(3)]}

        it.page.facts = facts
        await tab.look(1400)
        await tab.open(it.url)
        rows = "[...document.querySelectorAll('#transfers tbody tr')].map((row) => row.cells[4].innerText).join()"
        await tab.until(f"{rows} === 'uid:0,uid:1,uid:2'")
        first = await tab.run("document.querySelector('.heard').innerText")
        await tab.until(f"document.querySelector('.heard').innerText !== {first!r}")  # it was shown again
        assert await tab.run(rows) == "uid:0,uid:1,uid:2"
