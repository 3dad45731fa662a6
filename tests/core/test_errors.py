import pytest

from peermem.core.errors import Code, Internal, PeermemError, RegionNotFound


def test_a_fault_carries_reason_code_and_metadata() -> None:
    error = RegionNotFound("nodes/a/regions/x does not exist.", region="nodes/a/regions/x", tries=2)
    assert (error.reason, error.code) == ("REGION_NOT_FOUND", Code.NOT_FOUND)
    assert error.metadata == {"region": "nodes/a/regions/x", "tries": "2"}
    assert str(error) == error.message == "nodes/a/regions/x does not exist."


@pytest.mark.parametrize("reason", sorted(PeermemError.by_reason))
def test_every_fault_crosses_a_process_boundary(reason: str) -> None:
    error = PeermemError.restore(reason, "Why.", {"a": "1"})
    assert (error.reason, error.message, error.metadata) == (reason, "Why.", {"a": "1"})


def test_a_reason_of_a_newer_daemon_is_not_lost() -> None:
    assert isinstance(PeermemError.restore("BRAND_NEW", "Why.", {}), Internal)


def raised(error: PeermemError) -> PeermemError:
    try:
        raise ValueError from error
    except ValueError as cause:
        try:
            raise error from cause
        except PeermemError as told:
            return told


def test_what_is_kept_keeps_nobody() -> None:
    kept = RegionNotFound("Not here.", region="x")
    anew = raised(kept.again())
    assert (type(anew), anew.message, anew.metadata) == (RegionNotFound, "Not here.", {"region": "x"})
    assert kept.__traceback__ is None
    assert anew.bare() is anew
    assert (anew.__traceback__, anew.__cause__, anew.__context__) == (None, None, None)
