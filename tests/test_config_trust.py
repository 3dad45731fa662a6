"""Configuration of TLS and tokens: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from peermem.config import load
from tests.configs import problems, write

FILES = 'certificate = "/tls/cert.pem"\nkey = "/tls/key.pem"\nca = "/tls/ca.pem"\n'
NODES = 'nodes = "spiffe://example.org/peermem/{node}"\n'
TLS = f"[tls]\n{FILES}{NODES}"
KUBERNETES = '[kubernetes]\napi_server = "https://kubernetes.default.svc/"\n'


def test_tls_opens_the_network_without_insecure_network(tmp_path: Path) -> None:
    config = load(write(tmp_path, f'grpc.address = "10.0.0.1:7470"\ntcp.address = "10.0.0.1:7471"\n{TLS}'), {})
    assert config.tls.on
    assert (config.tls.certificate, config.tls.denied) == ("/tls/cert.pem", None)
    assert not load(write(tmp_path, ""), {}).tls.on


def test_with_tls_health_and_metrics_are_plain_where_other_hosts_reach_them(tmp_path: Path) -> None:
    http = 'http.address = "10.0.0.1:7472"\n'
    assert load(write(tmp_path, f"{http}{TLS}"), {}).http.address == "10.0.0.1:7472"
    file = write(tmp_path, http)
    assert any(found.startswith(f"{file}: http.address 10.0.0.1:7472 can be reached") for found in problems(file))


def test_tokens(tmp_path: Path) -> None:
    text = f'grpc.token_address = "127.0.0.1:7473"\n{TLS}{KUBERNETES}this_node_only = "node-7.example.org"'
    config = load(write(tmp_path, text), {"PEERMEM_KUBERNETES_AUDIENCE": "memory"})
    assert config.kubernetes.api_server == "https://kubernetes.default.svc"
    assert (config.kubernetes.audience, config.kubernetes.this_node_only) == ("memory", "node-7.example.org")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[tls]\nnodes = 'spiffe://example.org/node'",
            "tls.nodes is 'spiffe://example.org/node': expected a SPIFFE ID",
        ),
        ("[tls]\ncertificate = 'cert.pem'", "tls.certificate is 'cert.pem': expected an absolute path"),
        (f'[tls]\n{NODES}key = "/key"', "tls.certificate is missing. tls.certificate, tls.key and tls.ca are needed"),
        (f"[tls]\n{FILES}", "tls.nodes is empty, so that no node could be told from others."),
        (f'{TLS}workload_api = "/run/spire/agent.sock"', "tls.workload_api is set beside files that it stands for."),
        (f"insecure_network = true\n{TLS}", "insecure_network is true although [tls] is set"),
        ("grpc.token_address = '127.0.0.1:1'\n" + KUBERNETES, "grpc.token_address needs TLS"),
        ("grpc.token_address = '127.0.0.1:1'\n" + TLS, "grpc.token_address is of no use while no token counts."),
        (f"{TLS}anonymous = true", "tls.anonymous lets in who shows nothing, at grpc.token_address, which is empty."),
        ("grpc.token_address = '10.0.0.1:1'", "grpc.token_address needs TLS"),
        ("kubernetes.api_server = 'http://k:80'", "kubernetes.api_server is 'http://k:80': expected https://HOST"),
        ("kubernetes.api_server = 'https://u@k'", "kubernetes.api_server is 'https://u@k': expected https://HOST"),
        ("kubernetes.api_server = 'https://k:70000'", "kubernetes.api_server is 'https://k:70000': expected https://"),
        ("kubernetes.audience = 'a b'", "kubernetes.audience is 'a b': expected 1 to 253 printable characters"),
        ("kubernetes.this_node_only = 'A'", "kubernetes.this_node_only is 'A': expected 1 to 253 of a-z"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    file = write(tmp_path, text)
    assert any(found.startswith(f"{file}: {problem}") for found in problems(file))


@pytest.mark.parametrize(("address", "is_open"), [("127.0.0.1:7473", True), ("10.0.0.1:7473", False)])
def test_a_door_for_tokens_that_other_hosts_reach_needs_a_policy(tmp_path: Path, address: str, is_open: bool) -> None:
    text = f'grpc.address = "127.0.0.1:7470"\ngrpc.token_address = "{address}"\n{TLS}{KUBERNETES}'
    assert load(write(tmp_path, text), {}).is_open_without_policy is is_open
