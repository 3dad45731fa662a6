"""SPIFFE IDs: which are nodes, and which are denied."""

from __future__ import annotations

import pytest

from peermem.core.spiffe import Denied, NodePattern, is_spiffe_id

FINGERPRINT = "sha256:" + "0f" * 32


@pytest.mark.parametrize(
    "text",
    [
        "", "spiffe://", "spiffe:///x", "http://example.org/x", "spiffe://example.org/", "spiffe://example.org//x",
        "spiffe://Example.org/x", "spiffe://example.org/x y", "spiffe://example.org/x@b", "spiffe://example.org/x,gid:1",
        "spiffe://example.org:1/x", "spiffe://example.org/" + "x" * 300, "spiffe://example.org/x\n",
    ],
)  # fmt: skip
def test_what_is_no_spiffe_id(text: str) -> None:
    assert not is_spiffe_id(text)


def test_a_node_is_told_by_its_id_and_only_by_it() -> None:
    pattern = NodePattern("spiffe://example.org/peermem/{node}")
    assert pattern.spiffe_id("gpu-01") == "spiffe://example.org/peermem/gpu-01"
    assert is_spiffe_id(pattern.spiffe_id("gpu-01"))
    assert pattern.node(pattern.spiffe_id("gpu-01")) == "gpu-01"
    for other in (
        "spiffe://example.org/peermem/gpu-01/x",
        "spiffe://example.org/peermem/",
        "spiffe://example.org/peermem/a/b",
        "spiffe://example.org/peermem/A",
        "spiffe://example.org/peermem/a-",
        "spiffe://example.org/peermem/a.b",
        "spiffe://exampleXorg/peermem/a",
        "spiffe://example.org/peermem/a\n",
        "xspiffe://example.org/peermem/a",
    ):
        assert pattern.node(other) is None
    inner = NodePattern("spiffe://example.org/node/{node}/peermem")
    assert (inner.node("spiffe://example.org/node/b/peermem"), inner.node("spiffe://example.org/node/b")) == ("b", None)


@pytest.mark.parametrize(
    "text",
    ["", "{node}", "spiffe://example.org/peermem", "spiffe://{node}/x", "spiffe://example.org/a{node}",
     "spiffe://example.org/{node}b", "spiffe://example.org/{node}/{node}", "spiffe://example.org/x y/{node}"],
)  # fmt: skip
def test_a_pattern_without_one_place_for_the_node_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a SPIFFE ID with"):
        NodePattern(text)


def test_what_a_list_denies() -> None:
    denied = Denied.parse(f"# lost\nspiffe://example.org/job/7  # a job\n\n{FINGERPRINT}\n")
    assert denied.holds("spiffe://example.org/job/7", "sha256:else")
    assert denied.holds("spiffe://example.org/else", FINGERPRINT)
    assert not denied.holds("spiffe://example.org/job/8", "sha256:else")
    assert not Denied.parse("# nobody\n").holds("", "")


@pytest.mark.parametrize("text", ["job 7", FINGERPRINT.upper(), FINGERPRINT[:-1], "sha256:"])
def test_a_list_with_an_error_names_its_line(text: str) -> None:
    with pytest.raises(ValueError, match="line 2 is neither"):
        Denied.parse(f"#\n{text}\n")
