import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.errors import ContextLengthError, InputError, PocketLMError
from tests.unit.tiny_session import TinySession

VOCABULARY = 40


def test_a_long_prompt_runs_in_calls_that_the_runtime_takes() -> None:
    session = TinySession(VOCABULARY, longest_call=5, rows=3)
    session.extend(list(range(12)))
    assert session.calls == [(0, 5, 0), (5, 5, 0), (10, 2, 1)]
    assert session.position == 12
    assert session.tokens == list(range(12))


@given(
    tokens=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30),
    longest_call=st.integers(1, 9),
    rows=st.integers(1, 9),
    share=st.floats(0, 1),
)
@settings(deadline=None)
def test_logits_do_not_depend_on_the_calls(tokens: list[int], longest_call: int, rows: int, share: float) -> None:
    wanted = round(share * len(tokens))
    one = TinySession(VOCABULARY, longest_call=64, rows=64).extend(tokens, logits=len(tokens))
    session = TinySession(VOCABULARY, longest_call=longest_call, rows=rows)
    logits = session.extend(tokens, logits=wanted)
    assert logits.shape == (wanted, VOCABULARY)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, one[len(tokens) - wanted :], rtol=1e-5, atol=1e-5)
    assert all(count <= longest_call and asked <= min(rows, count) for _, count, asked in session.calls)
    assert sum(count for _, count, _ in session.calls) == len(tokens)


def test_rewind_forgets_what_came_after() -> None:
    session, fresh = TinySession(VOCABULARY), TinySession(VOCABULARY)
    session.extend([1, 2, 3, 4, 5, 6])
    session.rewind(3)
    assert session.tokens == [1, 2, 3]
    np.testing.assert_array_equal(session.extend([7, 8]), fresh.extend([1, 2, 3, 7, 8]))
    session.rewind(0)
    assert session.position == 0


@pytest.mark.parametrize(
    ("tokens", "logits", "error", "named"),
    [
        ([], 1, InputError, "non-empty"),
        ([[1, 2]], 1, InputError, "non-empty"),
        ([1, 2], 3, InputError, "between 0 and the 2"),
        ([1], -1, InputError, "between 0"),
        ([1, VOCABULARY], 1, InputError, f"{VOCABULARY} is outside"),
        ([-1], 1, InputError, "-1 is outside"),
        ([1] * 61, 1, ContextLengthError, "context of 64"),
    ],
)
def test_a_refused_call_changes_nothing(tokens: list, logits: int, error: type[Exception], named: str) -> None:
    session = TinySession(VOCABULARY)
    session.extend([1, 2, 3, 4])
    with pytest.raises(error, match=named):
        session.extend(tokens, logits=logits)
    assert session.tokens == [1, 2, 3, 4]


@pytest.mark.parametrize("position", [-1, 5])
def test_rewinding_ahead_is_refused(position: int) -> None:
    session = TinySession(VOCABULARY)
    session.extend([1, 2, 3, 4])
    with pytest.raises(InputError, match="holds 4"):
        session.rewind(position)


def test_a_context_can_be_filled_to_the_last_position() -> None:
    session = TinySession(VOCABULARY, context_length=8)
    session.extend([1] * 8)
    with pytest.raises(ContextLengthError, match="--context"):
        session.extend([1])


def test_a_closed_session_refuses_every_call() -> None:
    with TinySession(VOCABULARY) as session:
        session.extend([1, 2])
    session.close()
    for call in (lambda: session.extend([1]), lambda: session.rewind(0)):
        with pytest.raises(PocketLMError, match="closed"):
            call()


class _WaitingSession(TinySession):
    """Stays in a call until it is let go."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY)
        self.running, self.go_on = threading.Event(), threading.Event()

    def _run(self, tokens: np.ndarray, position: int, rows: int) -> np.ndarray:
        self.running.set()
        self.go_on.wait(10)
        return super()._run(tokens, position, rows)


def test_a_second_thread_is_refused_while_a_call_runs() -> None:
    session = _WaitingSession()
    thread = threading.Thread(target=session.extend, args=([1, 2, 3],))
    thread.start()
    assert session.running.wait(10)
    for call in (lambda: session.extend([1]), lambda: session.rewind(0), session.close):
        with pytest.raises(PocketLMError, match="busy"):
            call()
    session.go_on.set()
    thread.join()
    assert session.tokens == [1, 2, 3]
    session.extend([4])


class _InterruptedSession(TinySession):
    """Is interrupted in its third call."""

    def _run(self, tokens: np.ndarray, position: int, rows: int) -> np.ndarray:
        if len(self.calls) == 2:
            self.calls.append((position, 0, 0))
            raise KeyboardInterrupt
        return super()._run(tokens, position, rows)


def test_an_interrupted_prompt_keeps_the_calls_that_ended() -> None:
    session = _InterruptedSession(VOCABULARY, longest_call=5)
    with pytest.raises(KeyboardInterrupt):
        session.extend(list(range(20)))
    assert session.tokens == list(range(10))
    logits = session.extend(list(range(10, 20)))
    np.testing.assert_allclose(logits, TinySession(VOCABULARY).extend(list(range(20))), rtol=1e-5)
