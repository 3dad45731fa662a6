import pytest

from peermem.core.errors import InvalidField
from peermem.core.names import ChildName, check_id, parse_node, parse_region, parse_transfer


def test_names_read_and_write() -> None:
    assert parse_region("nodes/a/regions/x-1") == ChildName("a", "regions", "x-1")
    assert str(ChildName("a", "transfers", "t")) == "nodes/a/transfers/t"
    assert parse_transfer("nodes/a/transfers/t").id == "t"
    assert parse_node("nodes/node-7") == "node-7"


@pytest.mark.parametrize(
    "name",
    ["", "x", "nodes/a", "nodes/a/transfers/x", "nodes/A/regions/x", "nodes/a/regions/", "nodes/a/regions/x/y",
     "nodes/a/regions/x\n", "nodes/a/regions/-x", "nodes/a/regions/" + "x" * 64, "nodes/../regions/x", "\0"],
)  # fmt: skip
def test_what_is_no_region_name_is_refused_with_the_form(name: str) -> None:
    with pytest.raises(InvalidField, match="nodes/NODE/regions/REGION") as caught:
        parse_region(name, "segments.source")
    assert caught.value.metadata == {"field": "segments.source"}


@pytest.mark.parametrize("text", ["", "9x", "x_", "x-", "Ä", "x" * 64, "x\n"])
def test_what_is_no_id_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(InvalidField, match="region_id"):
        check_id(text, "region_id")
