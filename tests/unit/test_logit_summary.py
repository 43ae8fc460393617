"""The summary of a step's logits against what numpy says of the whole row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocketlm.logit_summary import summarize

# Few values, so that many are equal.
rows = arrays(np.float32, st.integers(1, 80), elements=st.sampled_from([-3.5, -1.0, 0.0, 0.25, 2.0, 7.5]))


@given(rows, st.integers(0, 90))
def test_it_is_what_sorting_the_whole_row_gives(logits, top):
    wide = logits.astype(np.float64)
    order = np.argsort(-wide, kind="stable")[:top]
    summary = summarize(logits, top)
    assert summary.choice == int(np.argmax(logits))
    assert summary.top == tuple((int(place), float(wide[place])) for place in order)
    assert summary.log_sum == pytest.approx(np.logaddexp.reduce(wide), rel=1e-12, abs=1e-12)
    assert summary.deviation == float(wide.std())


@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(strange):
    logits = np.zeros(50, np.float32)
    logits[7] = strange
    summary = summarize(logits, 4)
    assert summary.choice == 7
    assert len(summary.top) == 4
    assert not np.isfinite(summary.deviation)
    assert not np.isfinite(summary.log_sum)
