"""Any token, and any answer of the API server: a subject that the answer names, or a reason."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from peermem.api.kubernetes import TokenReviewer
from peermem.core.errors import AuthorityUnreachable, PeermemError, Unauthenticated
from peermem.core.identity import Subject
from tests.api_server import FakeApiServer, token
from tests.certificates import Authority
from tests.fuzzing import fuzz, tried


@dataclass
class Door:
    """A reviewer and the API server that it asks."""

    runner: asyncio.Runner
    stack: AsyncExitStack
    server: FakeApiServer
    reviewer: TokenReviewer

    def review(self, text: str) -> Subject | PeermemError:
        """Return whose a token is, or why nobody's."""
        try:
            return self.runner.run(self.reviewer.review(text))
        except PeermemError as error:
            return error


async def _opened(stack: AsyncExitStack, folder: Path) -> tuple[FakeApiServer, TokenReviewer]:
    server = await stack.enter_async_context(FakeApiServer(folder, Authority()).serving())
    reviewer = server.reviewer()
    stack.push_async_callback(reviewer.close)
    return server, reviewer


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    stack = AsyncExitStack()
    with asyncio.Runner() as runner:
        server, reviewer = runner.run(_opened(stack, tmp_path_factory.mktemp("fuzzed")))
        yield Door(runner, stack, server, reviewer)
        runner.run(stack.aclose())


_JSON: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 1 << 70), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
_PART = st.one_of(
    st.text("abcXYZ09-_=ÿ", max_size=30), st.binary(max_size=30).map(base64.urlsafe_b64encode).map(bytes.decode)
)


def _claims(claims: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")


tokens = st.one_of(
    st.lists(_PART, max_size=5).map(".".join),
    st.builds(
        lambda aud, exp: f"e30.{_claims({'aud': aud, 'exp': exp})}.c2ln",
        st.one_of(_JSON, st.just("peermem"), st.just(["x", "peermem"])),
        st.one_of(_JSON, st.just(time.time() + 3600)),
    ),
    _JSON.map(lambda claims: f"e30.{_claims(claims)}.c2ln"),
)


@fuzz(80)
@given(text=tokens)
def test_a_token_that_the_api_server_does_not_know_is_nobodys(door: Door, text: str) -> None:
    tried("Kubernetes tokens")
    door.server.answer = None
    assert isinstance(door.review(text), Unauthenticated)


_USER = st.one_of(
    st.sampled_from(("system:serviceaccount:ns:name", "system:serviceaccount:ns", "admin", "")), st.text(max_size=30)
)
statuses = st.fixed_dictionaries(
    {},
    optional={
        "authenticated": st.one_of(st.booleans(), _JSON),
        "user": st.one_of(
            st.fixed_dictionaries(
                {},
                optional={
                    "username": _USER,
                    "extra": st.one_of(_JSON, st.just({"authentication.kubernetes.io/node-name": ["node-9"]})),
                },
            ),
            _JSON,
        ),
        "audiences": st.one_of(st.just(["peermem"]), _JSON),
    },
)
answers = st.one_of(
    st.builds(lambda status: json.dumps({"status": status}).encode(), statuses),
    _JSON.map(lambda body: json.dumps(body).encode()),
    st.binary(max_size=60),
)


@fuzz(80)
@given(body=answers, status=st.sampled_from((200, 201, 201, 201, 202, 301, 401, 500)), number=st.integers(0, 1 << 60))
def test_any_answer_of_the_api_server_is_a_subject_or_a_reason(
    door: Door, body: bytes, status: int, number: int
) -> None:
    tried("TokenReview answers")
    door.server.answer = web.Response(body=body, status=status, headers={"Location": "/elsewhere"})
    outcome = door.review(token(jti=str(number)))
    if isinstance(outcome, Subject):
        assert status in (200, 201)
        told = json.loads(body)["status"]
        assert told["authenticated"] is True
        assert "peermem" in told["audiences"]
        _, _, namespace, account = told["user"]["username"].split(":")
        assert outcome == Subject(f"kubernetes:{namespace}/{account}")
    else:
        assert isinstance(outcome, (Unauthenticated, AuthorityUnreachable))
