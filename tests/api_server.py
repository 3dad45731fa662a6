"""A small Kubernetes API server: real HTTPS, TokenReview, and ResourceSlices of one node."""

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

from peermem.api.api_server import ApiClient, ApiServer
from peermem.api.kubernetes import TokenReviewer
from tests.certificates import Authority

OWN = "the-daemons-own"
SLICES = "/apis/resource.k8s.io/v1/resourceslices"
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
        self.slices: dict[str, dict[str, Any]] = {}
        self.nodes = {"worker-7": "uid-of-worker-7"}
        self.forbids = ""
        """A method that the daemon's ClusterRole does not have."""
        self.taints = True
        """Whether it knows taints of devices (DRADeviceTaints, off before Kubernetes 1.36)."""
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

    def client(self) -> ApiClient:
        return ApiClient(ApiServer(self.url, self.folder / "ca.pem", self.folder / "own"))

    def reviewer(self, audience: str = "peermem", node: str | None = None) -> TokenReviewer:
        return TokenReviewer(self.client(), audience, node)

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

    async def _node(self, request: web.Request) -> web.Response:
        uid = self.nodes.get(request.match_info["name"])
        return web.json_response({"metadata": {"uid": uid}}) if uid else web.Response(status=404)

    async def _slice(self, request: web.Request) -> web.Response:
        """As the real one: another version for each write, and a conflict where the one that is replaced is another."""
        if request.headers.get("Authorization") != f"Bearer {OWN}" or request.method == self.forbids:
            return web.Response(status=403)
        sent = await request.json() if request.method in ("POST", "PUT") else {}
        name = request.match_info.get("name") or sent["metadata"]["name"]
        known = self.slices.get(name)
        if (known is None) is not (request.method == "POST"):
            return web.Response(status=409 if known else 404)
        if request.method == "DELETE":
            return web.json_response(self.slices.pop(name))
        if known and sent and sent["metadata"].get("resourceVersion") != known["metadata"]["resourceVersion"]:
            return web.Response(status=409)
        if sent:
            version = int(known["metadata"]["resourceVersion"]) + 1 if known else 1
            for device in sent["spec"]["devices"]:
                taints = device.pop("taints", [])
                if self.taints:
                    device["taints"] = [{"timeAdded": "2026-01-01T00:00:00Z"} | taint for taint in taints]
            self.slices[name] = sent | {"metadata": sent["metadata"] | {"resourceVersion": str(version)}}
        return web.json_response(self.slices[name])

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeApiServer]:
        files = self.authority.issue(dns=None, ip="127.0.0.1").write(self.folder / "api")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(files / "cert.pem", files / "key.pem")
        app = web.Application()
        app.router.add_post(PATH, self._review)
        app.router.add_get("/api/v1/nodes/{name}", self._node)
        app.router.add_post(SLICES, self._slice)
        app.router.add_route("*", f"{SLICES}/{{name}}", self._slice)
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
