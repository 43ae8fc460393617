"""The fault table: each fault of the contract, put into a written artifact, must fail its verification.

One place a fault and a target runs in every change; every layer position that differs in the long run, where
``python -m tests.verify.fault_table`` also prints by how much each fault stands out.
"""

import pytest

from tests.verify.fault_table import CASES, TARGETS, FaultTable, Row
from tests.verify.injection import faults


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> FaultTable:
    return FaultTable(tmp_path_factory.mktemp("faults"))


def test_the_table_holds_every_fault_of_every_target():
    for target in TARGETS:
        assert {case.fault for case in CASES if case.target == target} == set(faults(target)), target


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_fault_nothing_fails(target, table):
    for model in {case.model for case in CASES if case.target == target}:
        assert table.fault_free(model, target).caught_by == ()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_fails_and_is_named(case, table):
    places = table.places(case)
    assert places, f"{case.model} has no place for it"
    check(case, table.row(case, places[len(places) // 2]))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_fails_wherever_it_is(case, table):
    for place in table.places(case):
        check(case, table.row(case, place))


def check(case, row: Row) -> None:
    """Caught by the bytes or by the graph, which don't depend on noise; the words name artifact and level."""
    assert set(row.caught_by) & {1, 2}, row
    assert row.words[0].startswith(f"{case.target}: level {row.caught_by[0]} ("), row.words
