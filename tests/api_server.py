"""A small Kubernetes API server: real HTTPS, TokenReview and nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from peermem.api.kubernetes import ApiServer
from tests.certificates import Authority

OWN = "the-daemons-own"
PATH = "/apis/authentication.k8s.io/v1/tokenreviews"


def token(audience: str | list[str] = "peermem", ends_in: float = 600.0, **claims: Any) -> str:
    """Return what a service account's token looks like; whether it counts, only the API server knows."""
    body = {"aud": audience, "exp": time.time() + ends_in, **claims}
    parts = ({"alg": "none"}, body)
    texts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join((*texts, "c2lnbmF0dXJl"))


class FakeApiServer:
    """Knows some tokens."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self.authority = authority
        self.known: dict[str, dict[str, Any]] = {}
        self.asked: list[dict[str, Any]] = []
        self.answer: web.Response | None = None
        """What it answers instead."""
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""
        (folder / "own").write_text(f"{OWN}\n")
        (folder / "ca.pem").write_bytes(authority.pem)

    def knows(
        self,
        text: str,
        user: str = "system:serviceaccount:training:loader",
        audiences: tuple[str, ...] = ("peermem",),
        **extra: list[str],
    ) -> str:
        named = {f"authentication.kubernetes.io/{key.replace('_', '-')}": value for key, value in extra.items()}
        self.known[text] = {
            "authenticated": True,
            "user": {"username": user, "uid": "1", "groups": ["system:authenticated"], "extra": named},
            "audiences": list(audiences),
        }
        return text

    def config(self, audience: str = "peermem", node: str | None = None) -> ApiServer:
        return ApiServer(self.url, self.folder / "ca.pem", self.folder / "own", audience, node)

    async def _review(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {OWN}":
            return web.Response(status=401)
        review = await request.json()
        self.asked.append(review)
        await self.gate.wait()
        if self.answer is not None:
            return self.answer
        unknown = {"authenticated": False, "error": "[invalid bearer token]"}
        return web.json_response(review | {"status": self.known.get(review["spec"]["token"], unknown)}, status=201)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeApiServer]:
        files = self.authority.issue(dns=None, ip="127.0.0.1").write(self.folder / "api")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(files / "cert.pem", files / "key.pem")
        app = web.Application()
        app.router.add_post(PATH, self._review)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.gate.set()
            await runner.cleanup()
