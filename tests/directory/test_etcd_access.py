"""TLS, users and tokens: who etcd is, and who is let in."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from peermem.core.errors import DirectoryUnreachable
from peermem.directory.base import Status
from peermem.directory.etcd_connection import Fault, Proof, connect
from peermem.directory.records import Keys
from tests.certificates import Authority
from tests.directory.conformance import A, B, written
from tests.directory.etcd_server import EtcdServer, etcd_server, needs_etcd
from tests.directory.support import opened, region, settings, until

pytestmark = needs_etcd

PASSWORD = "correct horse"
AUTHORITY = Authority()


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd with TLS, which wants certificates."""
    folder = tmp_path_factory.mktemp("secure")
    pair = AUTHORITY.issue(dns=None, ip="127.0.0.1").write(folder / "server")
    flags = [f"--cert-file={pair}/cert.pem", f"--key-file={pair}/key.pem", f"--trusted-ca-file={pair}/ca.pem"]
    with etcd_server(folder / "etcd", [*flags, "--client-cert-auth"], scheme="https") as server:
        yield server


def shown(folder: Path) -> Proof:
    return Proof(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")


async def test_with_certificates_of_the_same_authority(secure: EtcdServer, cluster: str, tmp_path: Path) -> None:
    pair = AUTHORITY.issue(dns=None, common="a").write(tmp_path / "a")
    chosen = settings(secure.endpoint, cluster, proof=shown(pair))
    async with opened(chosen, A) as a, opened(chosen, B):
        await until(a, lambda: "b" in a.nodes())


async def test_an_etcd_of_another_authority_is_not_believed(secure: EtcdServer, cluster: str, tmp_path: Path) -> None:
    pair = Authority("other").issue(dns=None, common="a").write(tmp_path / "a")
    async with opened(settings(secure.endpoint, cluster, proof=shown(pair))) as a:
        assert "certificate" in str(a.status().problem).lower()
        AUTHORITY.issue(dns=None, common="a").write(tmp_path / "a")
        await until(a, lambda: a.status().problem is None)


async def test_who_shows_no_certificate_is_not_let_in(secure: EtcdServer, cluster: str, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(AUTHORITY.pem)
    async with opened(settings(secure.endpoint, cluster, proof=Proof(tmp_path / "ca.pem"))) as a:
        assert isinstance(a.status().problem, DirectoryUnreachable)


async def test_a_file_that_is_missing_is_named(secure: EtcdServer, cluster: str, tmp_path: Path) -> None:
    async with opened(settings(secure.endpoint, cluster, proof=shown(tmp_path))) as a:
        assert f"{tmp_path}/ca.pem: No such file" in str(a.status().problem)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd with users, whose tokens end after a second without use; user peermem may use the cluster `mine`."""
    folder = tmp_path_factory.mktemp("guarded")
    with etcd_server(folder / "etcd", ["--auth-token-ttl=1", "--bcrypt-cost=4"]) as server:
        with_users(server)
        yield server


def with_users(server: EtcdServer) -> None:
    for name in ("root", "peermem"):
        server.ask("auth/user/add", name=name, password=PASSWORD)
        server.ask("auth/role/add", name=name)
        server.ask("auth/user/grant", user=name, role=name)
    span = {"key": "L3BlZXJtZW0vdjEvbWluZS8=", "range_end": "L3BlZXJtZW0vdjEvbWluZTA=", "permType": "READWRITE"}
    server.ask("auth/role/grant", name="peermem", perm=span)
    server.ask("auth/enable")


def as_user(folder: Path, password: str = PASSWORD) -> Proof:
    file = folder / "password"
    file.write_text(f"{password}\n")
    return Proof(user="peermem", password_file=file)


async def test_a_user_with_rights_on_its_cluster_only(guarded: EtcdServer, tmp_path: Path) -> None:
    chosen = settings(guarded.endpoint, "mine", proof=as_user(tmp_path))
    async with opened(chosen, A) as a, opened(chosen, B) as b:
        await until(a, lambda: "b" in a.nodes())
        b.publish(region("x", "b"))
        await written(b)
        assert len((await a.find({}, None, 10))[0]) == 1
    async with opened(replace(chosen, cluster="other")) as a:
        assert "permission denied" in str(a.status().problem)


async def test_a_token_that_has_ended_is_replaced(guarded: EtcdServer, tmp_path: Path) -> None:
    chosen = settings(guarded.endpoint, "mine", lease=2, proof=as_user(tmp_path))
    async with opened(chosen, A) as a:
        alike = guarded.ask("auth/authenticate", name="peermem", password=PASSWORD)["token"]
        for _ in range(4):  # which don't use the token
            before = a.status().counts.renewals
            await until(a, lambda before=before: a.status().counts.renewals > before)  # type: ignore[misc]
        with pytest.raises(AssertionError, match="invalid auth token"):
            guarded.ask("kv/range", token=alike, key=b"/peermem/v1/mine/x")
        assert await a.find({}, None, 10) == ([], None)
        assert (a.status().counts.resumes, a.status().away_for) == (0, None), "nothing was interrupted"


async def test_a_password_that_was_changed_is_read_again(guarded: EtcdServer, tmp_path: Path) -> None:
    proof = as_user(tmp_path)
    async with opened(settings(guarded.endpoint, "mine", lease=600, proof=proof), A) as a:
        change_password(guarded, "peermem", "battery staple")
        try:
            as_user(tmp_path, "battery staple")
            a.publish(region("x"))
            await written(a)
            assert len((await a.find({}, None, 10))[0]) == 1
            assert (a.status().counts.resumes, a.status().away_for) == (0, None), "nothing was interrupted"
        finally:
            change_password(guarded, "peermem", PASSWORD)
            as_user(tmp_path)


def change_password(server: EtcdServer, name: str, password: str) -> None:
    root = server.ask("auth/authenticate", name="root", password=PASSWORD)["token"]
    server.ask("auth/user/changepw", token=root, name=name, password=password)


async def test_a_signed_token_is_replaced_when_rights_change(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    (tmp_path / "public.pem").write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    token = f"jwt,pub-key={tmp_path}/public.pem,priv-key={tmp_path}/key.pem,sign-method=RS256,ttl=1h"
    with etcd_server(tmp_path / "etcd", [f"--auth-token={token}", "--bcrypt-cost=4"]) as server:
        with_users(server)
        async with opened(settings(server.endpoint, "mine", lease=600, proof=as_user(tmp_path)), A) as a:
            root = server.ask("auth/authenticate", name="root", password=PASSWORD)["token"]
            server.ask("auth/user/add", token=root, name="another", password=PASSWORD)
            a.publish(region("x"))
            await written(a)
            assert len((await a.find({}, None, 10))[0]) == 1
            assert (a.status().counts.resumes, a.status().away_for) == (0, None), "nothing was interrupted"


async def test_wrong_credentials_are_told_and_tried_again(
    guarded: EtcdServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = as_user(tmp_path, "tr0ub4dor")
    async with opened(settings(guarded.endpoint, "mine", proof=proof)) as a:
        problem = str(a.status().problem)
        assert "authentication failed" in problem
        (tmp_path / "password").write_text(PASSWORD)
        await until(a, lambda: a.status().problem is None)
    logged = capsys.readouterr().out
    assert logged.count("directory_away") == 1, "once, not at each attempt"
    assert "error" in logged
    assert "directory_reached" in logged
    for text in (problem, logged):
        assert "tr0ub4dor" not in text
        assert PASSWORD not in text


async def test_nobody_is_let_in_without_a_user(guarded: EtcdServer) -> None:
    async with opened(settings(guarded.endpoint, "mine")) as a:
        assert isinstance(a.status(), Status)
        assert "user name is empty" in str(a.status().problem)


async def test_who_may_not_write_regions_stays_known(guarded: EtcdServer, tmp_path: Path) -> None:
    root = guarded.ask("auth/authenticate", name="root", password=PASSWORD)["token"]
    guarded.ask("auth/user/add", token=root, name="reader", password=PASSWORD)
    guarded.ask("auth/role/add", token=root, name="reader")
    guarded.ask("auth/user/grant", token=root, user="reader", role="reader")
    key, end = (b64encode(text).decode() for text in (b"/peermem/v1/mine/nodes/", b"/peermem/v1/mine/nodes0"))
    perm = {"key": key, "range_end": end, "permType": "READWRITE"}
    guarded.ask("auth/role/grant", token=root, name="reader", perm=perm)
    proof = replace(as_user(tmp_path), user="reader")
    async with opened(settings(guarded.endpoint, "mine", lease=2, proof=proof), A) as a:
        a.publish(region("x"))
        for _ in range(2):
            before = a.status().counts.renewals
            await until(a, lambda before=before: a.status().counts.renewals > before)  # type: ignore[misc]
        assert (a.status().unwritten, a.status().away_for, a.status().counts.resumes) == (1, None, 0)


async def test_a_file_that_is_too_large_is_named(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(Fault, match=f"{file} has more than"):
        await connect("127.0.0.1:1", Proof(user="peermem", password_file=file))


async def test_a_call_on_a_connection_that_was_closed_is_a_fault(etcd: EtcdServer, cluster: str) -> None:
    connection = await connect(etcd.endpoint, Proof())
    await connection.close()
    with pytest.raises(Fault):
        await connection.range(Keys("/peermem/v1", cluster).regions)
