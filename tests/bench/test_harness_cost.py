"""The cost of the harness: what it is the difference of. How much it is, no test asks."""

from pocketlm.agent import decode
from pocketlm_bench.harness_cost import InstantSession, harness_seconds


def test_the_agents_own_loop_runs_over_a_session_that_answers_at_once():
    session = InstantSession(320)
    tokens, intervals = decode(session, 7, 5)
    choice = int(session.extend([0])[-1].argmax())
    assert tokens == [7, choice, choice, choice, choice]
    assert len(intervals) == 4
    assert len(harness_seconds(320, rounds=3, tokens=10)) == 3
