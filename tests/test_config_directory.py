"""The configuration of the directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from peermem.config import load
from tests.configs import problems, write

ETCD = '[directory]\nkind = "etcd"\n[directory.etcd]\n'
AT = 'endpoints = ["10.0.0.1:2379"]\n'
LEASE = "expected a duration with its unit (ms, s, min, h, d) from 2s to 10min"


def test_etcd_is_read(tmp_path: Path) -> None:
    text = (
        f'{ETCD}endpoints = ["10.0.0.1:2379", "[fd00::2]:2379"]\nprefix = "/team/peermem"\ncluster = "lab"\n'
        'lease = "1min"\nmax_published = 0\nca = "/ca.pem"\ncertificate = "/c.pem"\nkey = "/k.pem"\nuser = "peermem"\n'
        'password_file = "/run/secrets/etcd"\n'
    )
    directory = load(write(tmp_path, text), {}).directory
    etcd = directory.etcd
    assert (directory.kind, etcd.endpoints) == ("etcd", ("10.0.0.1:2379", "[fd00::2]:2379"))
    assert (etcd.prefix, etcd.cluster, etcd.lease, etcd.max_published) == ("/team/peermem", "lab", 60.0, 0)
    assert (etcd.ca, etcd.certificate, etcd.key) == ("/ca.pem", "/c.pem", "/k.pem")
    assert (etcd.user, etcd.password_file) == ("peermem", "/run/secrets/etcd")


def test_variables_alone_are_enough(tmp_path: Path) -> None:
    environ = {"PEERMEM_DIRECTORY_KIND": "etcd", "PEERMEM_DIRECTORY_ETCD_ENDPOINTS": '["127.0.0.1:2379"]'}
    assert load(write(tmp_path, ""), environ).directory.etcd.endpoints == ("127.0.0.1:2379",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ETCD, 'directory.etcd.endpoints is empty while directory.kind is "etcd"'),
        (f"[directory.etcd]\n{AT}", 'not used while directory.kind is "static"'),
        (
            f'{ETCD}{AT}[directory.nodes]\nb = "10.0.0.2:1"',
            'directory.nodes are not used while directory.kind is "etcd"',
        ),
        (f'{ETCD}endpoints = ["10.0.0.1"]', "directory.etcd.endpoints[0] is '10.0.0.1': expected host:port"),
        (f'{ETCD}endpoints = ["http://10.0.0.1:2379"]', "endpoints[0] is 'http://10.0.0.1:2379': expected host:port"),
        (f'{ETCD}{AT}lease = "1s"', f"directory.etcd.lease is '1s': {LEASE}"),
        (f'{ETCD}{AT}lease = "11min"', f"directory.etcd.lease is '11min': {LEASE}"),
        (f'{ETCD}{AT}lease = "2.5s"', f"directory.etcd.lease is '2.5s': {LEASE}"),
        (f"{ETCD}{AT}lease = 15", f"directory.etcd.lease is 15: {LEASE}"),
        (f"{ETCD}{AT}max_published = 65537", "max_published is 65537: expected a whole number from 0 to 65536"),
        (f'{ETCD}{AT}prefix = "peermem"', "directory.etcd.prefix is 'peermem': expected parts of"),
        (f'{ETCD}{AT}prefix = "/a//b"', "directory.etcd.prefix is '/a//b': expected parts of"),
        (f'{ETCD}{AT}prefix = "/a/"', "directory.etcd.prefix is '/a/': expected parts of"),
        (f'{ETCD}{AT}cluster = "a/b"', "directory.etcd.cluster is 'a/b': expected 1 to 63"),
        (f'{ETCD}{AT}user = "a b"', "directory.etcd.user is 'a b': expected 1 to 64 printable"),
        (f'{ETCD}{AT}certificate = "/c.pem"', "its key and directory.etcd.ca are needed together"),
        (f'{ETCD}{AT}certificate = "/c.pem"\nkey = "/k.pem"', "its key and directory.etcd.ca are needed together"),
        (f'{ETCD}{AT}ca = "/ca.pem"\nuser = "a"', "directory.etcd.password_file are needed together"),
        (f'{ETCD}{AT}user = "a"\npassword_file = "/p"', "directory.etcd.user needs TLS"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems(write(tmp_path, text))
    assert problem in found


def test_a_password_may_go_to_this_host_in_the_plain(tmp_path: Path) -> None:
    text = f'{ETCD}endpoints = ["127.0.0.1:2379"]\nuser = "a"\npassword_file = "/p"'
    assert load(write(tmp_path, text), {}).directory.etcd.user == "a"
