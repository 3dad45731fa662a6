"""A headless Chromium, driven over its DevTools protocol: for tests of the page and pictures of it.

Rules of this file:

* It is the distribution's Chromium (Debian: `chromium`), in a profile of its own that is gone with it.
* What the page writes into its console, and what the browser reports of it, is kept: `complaints`.

The protocol: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE = 30.0
BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--disable-lcd-text",
    "--force-color-profile=srgb",
)


class Tab:
    """One page of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        """What went wrong in it: errors and warnings of scripts, of the network and of the page's policy."""
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reading = asyncio.get_running_loop().create_task(self._read())

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command. Raises RuntimeError where the browser refuses it."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(PATIENCE + 10):
            return await self._waiting[number]

    async def open(self, url: str) -> None:
        """Begin to show a page, and note what goes wrong in it from now on."""
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def look(self, width: int, height: int = 900, *, dark: bool = False, scale: float = 1.0) -> None:
        """Set the window's size, in CSS pixels, and the colour scheme that the page is told."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def run(self, script: str) -> Any:
        """Return the value of an expression in the page. Raises RuntimeError where it throws."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "the script threw"))
        return answer["result"].get("value")

    async def until(self, script: str, patience: float = PATIENCE) -> Any:
        """Wait until an expression in the page is true, and return it. Raises AssertionError with what is shown."""
        waits = f"""new Promise((done) => {{
            const end = performance.now() + {patience * 1000};
            const ask = () => {{
                let value = null;
                try {{ value = ({script}); }} catch {{}}
                value = Array.isArray(value) || typeof value !== "object" ? value : !!value;
                if (value || performance.now() > end) done(value); else setTimeout(ask, 20);
            }};
            ask();
        }})"""
        value = await self.run(waits)
        if not value:
            shown = await self.run("document.body.innerText")
            raise AssertionError(f"{script} did not become true; the page shows:\n{shown}\n{self.complaints}")
        return value

    async def picture(self, file: Path, selector: str = "") -> None:
        """Write what is shown, or one element of it, as PNG."""
        clip: dict[str, Any] = {}
        if selector:
            box = await self.run(
                f"(() => {{ const box = document.querySelector({selector!r}).getBoundingClientRect(); "
                "return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height}; })()"
            )
            clip = {"clip": {**box, "scale": 1}, "captureBeyondViewport": True}
        answer = await self.call("Page.captureScreenshot", format="png", **clip)
        await asyncio.to_thread(file.write_bytes, packed(base64.b64decode(answer["data"])))

    async def close(self) -> None:
        """End it."""
        await self._socket.close()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            event = message.json()
            waiting = self._waiting.pop(event.get("id", 0), None)
            if waiting is None:
                self._note(event.get("method", ""), event.get("params", {}))
            elif "error" in event:
                waiting.set_exception(RuntimeError(event["error"]["message"]))
            else:
                waiting.set_result(event["result"])

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"].get("exception", parameters)))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(" ".join(str(each.get("value", each)) for each in parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")


def packed(png: bytes) -> bytes:
    """Return a PNG whose data are compressed as far as they can be; the browser hurries (PNG, third edition, 5.3)."""
    kept, data, at = [png[:8]], b"", 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        elif kind in (b"IHDR", b"PLTE", b"IEND"):
            kept.append(png[at : at + 12 + length])
        at += 12 + length
    body = b"IDAT" + zlib.compress(zlib.decompress(data), 9)
    kept.insert(-1, struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
    return b"".join(kept)


@asynccontextmanager
async def browser() -> AsyncIterator[Tab]:
    """Run Chromium with one tab, and end it."""
    assert BINARY is not None, "no Chromium is installed"
    with tempfile.TemporaryDirectory(prefix="peermem-chromium-", ignore_cleanup_errors=True) as profile:
        options = [*_OPTIONS, *(("--no-sandbox",) if os.geteuid() == 0 else ())]
        process = await asyncio.create_subprocess_exec(
            BINARY,
            *options,
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        draining: asyncio.Future[tuple[bytes, bytes]] | None = None
        try:
            port = await _port(process)
            draining = asyncio.ensure_future(process.communicate())
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    (target, *_) = [each for each in await answer.json() if each["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    yield tab
                    await tab.close()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await (draining or process.communicate())


async def _port(process: asyncio.subprocess.Process) -> int:
    """Return the port that the browser says it listens on."""
    assert process.stderr is not None
    seen = b""
    async with asyncio.timeout(PATIENCE):
        while line := await process.stderr.readline():
            seen += line
            if line.startswith(b"DevTools listening on ws://"):
                return int(line.split(b"/")[2].rpartition(b":")[2])
    raise AssertionError(f"Chromium did not start:\n{seen.decode(errors='replace')}")
