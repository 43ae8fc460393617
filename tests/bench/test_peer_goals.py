"""Goals and ratios of a comparison, from rounds as they are recorded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import InputError
from pocketlm_bench.peer.goals import EXPORT_GOALS, RATE_GOALS, Goal, judge
from pocketlm_bench.peer.running import decode_rate

FASTER = Goal("decode", "ours", "theirs", "decode", must=1.0, reach=1.5, at_least=True)
SMALLER = Goal("memory", "ours", None, "peak", must=1.6e9, reach=1e9)
VNNI = Goal("decode", "ours", "theirs", "decode", must=1.0, reach=1.5, at_least=True, needs="avx512_vnni")
POSITIVE = st.floats(1e-3, 1e6)


def rounds(ours: list[float], theirs: list[float]) -> dict[str, list[dict[str, float]]]:
    return {"ours": [{"decode": value} for value in ours], "theirs": [{"decode": value} for value in theirs]}


@pytest.mark.parametrize(
    ("ours", "status"),
    [(0.99, "missed"), (1.0, "must"), (1.49, "must"), (1.5, "reached for"), (9.0, "reached for")],
)
def test_a_status_at_least(ours, status):
    (verdict,) = judge([FASTER], rounds([ours], [1.0]), [])
    assert (verdict.status, verdict.median) == (status, ours)


@pytest.mark.parametrize(("peak", "status"), [(1.7e9, "missed"), (1.6e9, "must"), (1e9, "reached for")])
def test_a_status_at_most_and_absolute(peak, status):
    (verdict,) = judge([SMALLER], {"ours": [{"peak": peak}]}, [])
    assert verdict.status == status


def test_the_median_of_the_rounds_decides():
    (verdict,) = judge([FASTER], rounds([0.2, 1.2, 30.0], [1.0, 1.0, 1.0]), [])
    assert verdict.values == (0.2, 1.2, 30.0)
    assert verdict.status == "must"


def test_a_goal_that_the_cpu_cannot_show_is_not_asked():
    slow = rounds([0.1], [1.0])
    assert [verdict.status for verdict in judge([VNNI], slow, ["avx2"])] == ["not asked"]
    assert [verdict.status for verdict in judge([VNNI], slow, ["avx2", "avx512_vnni"])] == ["missed"]


@given(st.lists(st.tuples(POSITIVE, POSITIVE, POSITIVE), min_size=1, max_size=9))
def test_a_machine_that_is_slower_in_a_round_changes_no_ratio(samples):
    quiet = judge([FASTER], rounds([a for a, _, _ in samples], [b for _, b, _ in samples]), [])
    busy = judge([FASTER], rounds([a * c for a, _, c in samples], [b * c for _, b, c in samples]), [])
    assert busy[0].values == pytest.approx(quiet[0].values)


def test_goals_without_their_peer_are_left_out_and_uneven_rounds_refused():
    assert judge([FASTER], {"ours": [{"decode": 1.0}]}, []) == []
    with pytest.raises(InputError, match="ours has 2 rounds, but theirs 1"):
        judge([FASTER], rounds([1.0, 1.0], [1.0]), [])


def test_n_tokens_are_n_minus_one_intervals():
    assert decode_rate([0.5, 0.25, 0.25]) == 3.0


def test_every_goal_asks_for_more_when_it_reaches():
    for goal in (*EXPORT_GOALS, *RATE_GOALS):
        assert goal.reach is None or goal.met(goal.reach, goal.must)
        assert not goal.met(goal.must * (0.99 if goal.at_least else 1.01), goal.must)
