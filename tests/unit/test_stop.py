import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import InputError
from pocketlm.stop import StopStrings

LETTERS = st.text("ab\n🙂", max_size=12)


def passed(strings: list[str], pieces: list[str]) -> tuple[list[str], str, str | None]:
    stop = StopStrings(strings)
    shown = [stop.feed(piece) for piece in pieces]
    return shown, "".join(shown) + stop.finish(), stop.matched


def expected(strings: list[str], text: str) -> tuple[str, str | None]:
    """Letter by letter: the first string to be complete ends the text."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(strings=st.lists(st.text("ab\n🙂", min_size=1, max_size=4), max_size=3), pieces=st.lists(LETTERS, max_size=8))
def test_the_cuts_between_pieces_do_not_matter(strings: list[str], pieces: list[str]) -> None:
    shown, text, matched = passed(strings, pieces)
    assert (text, matched) == expected(strings, "".join(pieces))
    for count in range(len(shown)):
        assert text.startswith("".join(shown[: count + 1]))


@given(strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), text=st.text("abc", max_size=12))
def test_only_a_possible_beginning_is_held_back(strings: list[str], text: str) -> None:
    stop = StopStrings(strings)
    shown = stop.feed(text)
    if stop.matched is None:
        held = text[len(shown) :]
        assert not held or any(string.startswith(held) for string in strings)


def test_a_stop_string_over_three_pieces() -> None:
    shown, text, matched = passed(["\nUser:"], ["Hi!", "\nUs", "er", ": more"])
    assert shown == ["Hi!", "", "", ""]
    assert (text, matched) == ("Hi!", "\nUser:")


def test_what_only_looked_like_a_stop_string_comes_later() -> None:
    shown, _, matched = passed(["\nUser:"], ["a\nUs", "ual"])
    assert shown == ["a", "\nUsual"]
    assert matched is None


def test_one_string_is_one_stop_string() -> None:
    assert StopStrings("ab").feed("xbaab") == "xba"


@pytest.mark.parametrize("strings", [[""], ["a", ""], [3]])
def test_an_empty_stop_string_is_refused(strings: list) -> None:
    with pytest.raises(InputError, match="stop string"):
        StopStrings(strings)
