"""Any configuration file and any variables: a whole configuration, or a sentence for each thing that is wrong."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from peermem.config import load
from peermem.strict_toml import ConfigError
from tests.fuzzing import fuzz, tried
from tests.test_config import SHIPPED

TEXT = SHIPPED.read_text()
LINES = [line.removeprefix("# ") for line in TEXT.splitlines() if "=" in line or "[" in line]
VALUES = (
    '""',
    "-1",
    "0",
    "1e400",
    "nan",
    "true",
    '"1s"',
    '"99999TiB"',
    '"[::1]:0"',
    "[]",
    "{}",
    '"\\u0000"',
    '"../.."',
    "2026-01-01",
)
KEYS = sorted({line.partition(" = ")[0] for line in LINES if " = " in line})
odd = st.builds(lambda key, value: f"{key} = {value}", st.sampled_from(KEYS), st.sampled_from(VALUES))
NAMES = [
    "NODE",
    "GRPC_ADDRESS",
    "TCP_RAILS",
    "FAILPOINTS",
    "DEVICE",
    "DIRECTORY_NODES",
    "TRANSFER_GRANT_TTL",
    "NOTHING",
]
variables = st.dictionaries(
    st.sampled_from([f"PEERMEM_{name}" for name in NAMES]),
    st.one_of(st.sampled_from(VALUES), st.text(max_size=30)),
    max_size=3,
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Near configurations, and what is none."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        return "\n".join(draw(st.lists(st.one_of(st.sampled_from(LINES), odd), max_size=12))).encode()
    at = draw(st.integers(0, len(TEXT)))
    new = draw(st.one_of(odd.map("\n{}\n".format), st.text(max_size=4)))
    return (TEXT[:at] + new + TEXT[at + draw(st.integers(0, 8)) :]).encode()


@fuzz(100)
@given(data=files(), environ=variables)
def test_any_configuration_is_taken_whole_or_refused(data: bytes, environ: dict[str, str]) -> None:
    tried("configuration files")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "peermem.toml"
        file.write_bytes(data)
        try:
            config = load(file, environ)
        except ConfigError as refused:
            problems = refused.problems
        else:
            problems = ("none",)
            address = config.grpc.address
            assert not address or address.is_loopback or config.insecure_network or config.tls.on
        assert problems
        assert all(problem.strip() for problem in problems)
