"""Verdicts of a replay: what noise explains passes, what it doesn't fails, and what can't be judged says so."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pocketlm.certificate import Certificate, Check, Evidence, Level, TargetCertificate
from pocketlm.devices.base import Outcome
from pocketlm.errors import UnavailableError
from pocketlm.logit_summary import summarize
from pocketlm.replaying.answer import Numbers, ReplayedStep, read_replay
from pocketlm.replaying.expectation import ExpectedSequence, GoldenStep, RecordedStep
from pocketlm.replaying.judgement import SHORTEST_JUDGED, Judgement, judge
from pocketlm.replaying.limits import WIDE_MARGIN, Side, limits_of
from pocketlm.results import ReplayLimits

LIMITS = ReplayLimits(margin=0.1, drift=0.2, mean_kl=1e-3, certified=True)
UNCERTIFIED = {"drift": None, "mean_kl": None, "certified": False}
LOGITS = np.array([3.0, 5.0, 4.9, -2.0, 4.0, 0.0], np.float32)


def recorded(logits: np.ndarray, top: int = 4) -> RecordedStep:
    summary = summarize(logits, top)
    return RecordedStep(*(list(column) for column in zip(*summary.top, strict=True)), summary.log_sum)


def replayed(logits: np.ndarray, ids: Sequence[int]) -> ReplayedStep:
    """What the agent tells of such logits."""
    summary = summarize(logits, 2)
    return ReplayedStep(
        choice=summary.choice,
        values=[float(logits[number]) for number in ids],
        top=[list(pair) for pair in summary.top],
        log_sum=summary.log_sum,
    )


def sequence_of(*steps: Any, deviation: float = 1.0) -> ExpectedSequence:
    return ExpectedSequence((0,), tuple(step.choice for step in steps), steps, deviation)


def judged(before: np.ndarray, after: np.ndarray, *, steps: int = 1, **changes: Any) -> Judgement:
    """``before`` recorded, ``after`` replayed, so many times."""
    step = recorded(before)
    expected = sequence_of(*[step] * steps, deviation=float(before.std()))
    return judge([expected], [[replayed(after, step.ids)] * steps], LIMITS.model_copy(update=changes))


def test_the_same_logits_pass():
    found = judged(LOGITS, LOGITS, steps=SHORTEST_JUDGED)
    assert (found.agreeing, found.steps, found.first_divergence) == (SHORTEST_JUDGED, SHORTEST_JUDGED, None)
    assert found.mean_kl == 0
    assert (found.failures, found.notes) == ([], [])


def test_a_near_tie_passes():
    after = LOGITS + np.array([0, 0, 0.11, 0, 0, 0], np.float32)
    found = judged(LOGITS, after, **UNCERTIFIED)
    assert found.failures == []
    divergence = found.first_divergence
    assert divergence == found.widest_divergence
    assert (divergence.sequence, divergence.step, divergence.recorded, divergence.chosen) == (1, 1, 1, 2)
    assert divergence.margin == pytest.approx(0.1 / LOGITS.std(), rel=1e-5)
    assert not divergence.wide


def test_a_wide_margin_fails_and_the_first_such_step_is_named():
    near, wide = LOGITS.copy(), LOGITS.copy()
    near[2], wide[4] = 5.1, 5.1
    step = recorded(LOGITS)
    expected = [sequence_of(step), sequence_of(step, step, step, deviation=float(LOGITS.std()))]
    answers = [[replayed(near, step.ids)], [replayed(values, step.ids) for values in (LOGITS, wide, wide)]]
    found = judge(expected, answers, LIMITS.model_copy(update={**UNCERTIFIED, "margin": 0.11}))
    assert found.agreeing == 1
    assert (found.first_divergence.sequence, found.first_divergence.step) == (1, 1)
    assert (found.widest_divergence.sequence, found.widest_divergence.step) == (2, 2)
    assert len(found.failures) == 1
    assert found.failures[0].startswith(f"sequence 2, step 2: margin {1 / LOGITS.std():.3g} of the deviation")
    assert "at most 0.11" in found.failures[0]


def test_a_choice_that_was_not_kept_is_at_least_as_far_off_as_the_last_that_was():
    after = LOGITS.copy()
    after[3] = 9
    margin = judged(LOGITS, after).first_divergence.margin
    assert margin == pytest.approx((5.0 - 3.0) / LOGITS.std())


@pytest.mark.parametrize(("margin", "wide"), [(0.10, False), (0.105, False), (0.11, True)])
def test_a_golden_margin_may_be_half_a_digit_smaller_than_it_says(margin, wide):
    step = GoldenStep(2, margin)
    found = judge([sequence_of(step)], [[replayed(LOGITS, step.ids)]], LIMITS.model_copy(update={"drift": 0.3}))
    assert found.first_divergence.chosen == 1
    assert found.first_divergence.wide is wide
    assert bool(found.failures) is wide
    assert found.mean_kl is None


@pytest.mark.parametrize(("margin", "passes"), [(0.3, True), (0.1, True), (0.304, True), (0.31, False), (0.0, True)])
def test_a_golden_margin_that_drifts_fails_where_no_choice_differs(margin, passes):
    """Replayed, it is 0.1; the limit is 0.2, and half a digit more."""
    step = GoldenStep(1, margin)
    found = judge([sequence_of(step)], [[replayed(LOGITS, step.ids)]], LIMITS)
    assert found.largest_drift == pytest.approx(max(0, abs(margin - 0.1) - 0.005), abs=1e-6)
    assert (found.failures == []) is passes
    if not passes:
        assert found.failures[0].startswith("sequence 1, step 1: the margin is off by 0.205 of the deviation")


def test_a_choice_that_is_no_longer_the_first_has_a_negative_margin():
    step = GoldenStep(1, 0.5)
    after = LOGITS.copy()
    after[4] = 5.25
    found = judge([sequence_of(step)], [[replayed(after, step.ids)]], LIMITS)
    assert found.largest_drift == pytest.approx(0.5 + 0.25 - 0.005)


def test_a_mean_kl_above_the_limit_fails_where_no_choice_differs():
    after = LOGITS.copy()
    after[1] += 0.25
    found = judged(LOGITS, after, steps=SHORTEST_JUDGED)
    assert found.agreeing == found.steps
    assert len(found.failures) == 1
    assert found.failures[0].startswith("mean KL 0.")
    assert "limit 0.001" in found.failures[0]


@pytest.mark.parametrize(
    ("steps", "changes", "note"),
    [(SHORTEST_JUDGED - 1, {}, "fewer than 16 steps"), (SHORTEST_JUDGED, UNCERTIFIED, "no certificate")],
)
def test_what_is_not_judged_is_said_and_why(steps, changes, note):
    after = LOGITS.copy()
    after[1] += 0.25
    found = judged(LOGITS, after, steps=steps, **changes)
    assert found.failures == []
    assert found.mean_kl > 1e-3
    assert len(found.notes) == 1
    assert note in found.notes[0]


def test_logits_that_are_not_finite_fail():
    step = recorded(LOGITS)
    answer = replayed(LOGITS, step.ids).model_copy(update={"log_sum": None, "values": [None] * len(step.ids)})
    found = judge([sequence_of(step)], [[answer]], LIMITS)
    assert found.failures == ["sequence 1, step 1: a logit is not finite"]
    assert (found.largest_drift, found.mean_kl) == (None, None)


rows = arrays(np.float32, 40, elements=st.floats(-12, 12, width=32))


def full_kl(before: np.ndarray, after: np.ndarray) -> float:
    left, right = (values - np.logaddexp.reduce(values) for values in (before.astype(float), after.astype(float)))
    return float((np.exp(left) * (left - right)).sum())


@given(rows, rows, st.integers(2, 40))
@example(np.zeros(40, np.float32), np.array([6.844122, *[-11.393223] * 39], np.float32), 2)  # the rest is all alike
def test_the_kl_of_the_kept_logits_is_never_larger_than_that_of_all(before, after, top):
    step = recorded(before, top)
    answer = replayed(after, step.ids)
    kept = step.kl(answer.numbers.values, answer.numbers.log_sum)
    assert 0 <= kept <= full_kl(before, after) + 1e-9
    if top == 40:
        assert kept == pytest.approx(full_kl(before, after), abs=1e-9)


def certificate(**targets: dict[str, float]) -> Certificate:
    """With the thresholds of level 5, by target."""
    return Certificate(
        format_version="1.0",
        manifest_sha256="0" * 64,
        pocketlm="0.1.0",
        libraries={},
        machine={},
        evidence=Evidence(texts=1, prefill_tokens=1, decode_steps=1, judged_positions=1, probes=[]),
        targets={
            name: TargetCertificate(
                levels=[
                    Level(level=1, name="bytes", status="passed", checks=[check("greedy regret", 99.0)]),
                    Level(level=5, name="whole", status="passed", checks=[check(*item) for item in thresholds.items()]),
                ]
            )
            for name, thresholds in targets.items()
        },
        text=[],
    )


def check(name: str, threshold: float) -> Check:
    return Check(name=name, figure=0.0, threshold=threshold, passed=True)


INT8 = {"root mean square": 0.01, "mean KL": 4e-4, "greedy regret": 0.06}


X86, ARM = {"features": "avx2 avx512f"}, {"features": "asimddp i8mm"}


def limits(
    known: Certificate | None, replayed_by: str, recorded_by: str | None, machine: dict[str, str] = X86
) -> tuple[float, float | None, bool]:
    recorder = None if recorded_by is None else Side(recorded_by, X86)
    found = limits_of(known, replayed_by=Side(replayed_by, machine), recorded_by=recorder, deviation=2.0)
    assert found.drift == (2 * found.margin if found.certified else None)
    return found.margin, found.mean_kl, found.certified


def test_the_reference_is_exact_and_a_runtime_is_not():
    known = certificate(onnx=INT8, executorch={"mean KL": 9e-4, "greedy regret": 0.1})
    assert limits(known, "onnx", None) == (0.06, pytest.approx(4e-4), True)
    # Margins add up, and so do the roots of KL: 0.02 + 0.03, squared.
    assert limits(known, "onnx", "executorch") == (pytest.approx(0.16), pytest.approx(2.5e-3), True)
    assert limits(known, "onnx", "onnx") == (pytest.approx(0.12), pytest.approx(1.6e-3), True)


@pytest.mark.parametrize("machine", [ARM, {"cpu": "arm64", "system": "Darwin"}])
def test_where_onnx_runtime_rounds_by_rows_its_noise_is_that_of_executorch(machine):
    known = certificate(onnx=INT8, executorch={"mean KL": 9e-4, "greedy regret": 0.05})
    assert limits(known, "onnx", None, machine) == (0.06, pytest.approx(9e-4), True)
    assert limits(known, "onnx", "onnx", machine) == (pytest.approx(0.12), pytest.approx(2.5e-3), True)
    assert limits(known, "executorch", None, machine) == (0.05, pytest.approx(9e-4), True)
    assert limits(certificate(onnx=INT8), "onnx", None, machine) == (WIDE_MARGIN, None, False)
    float32 = certificate(onnx={"root mean square": 1e-5, "greedy regret": 1e-4})
    assert limits(float32, "onnx", None, machine) == (1e-4, pytest.approx(2e-8), True)


@pytest.mark.parametrize("machine", [X86, {"features": "asimd"}, {"features": ""}, {"cpu": "x86_64"}])
def test_elsewhere_onnx_runtime_rounds_by_blocks(machine):
    known = certificate(onnx=INT8, executorch={"mean KL": 9e-4, "greedy regret": 0.1})
    assert limits(known, "onnx", None, machine) == (0.06, pytest.approx(4e-4), True)


def test_what_a_level_states_instead_of_a_kl():
    float32 = {"root mean square": 1e-5, "greedy regret": 1e-4}
    assert limits(certificate(onnx=float32), "onnx", None) == (1e-4, pytest.approx(2e-8), True)
    float16 = {"largest difference": 0.05}
    assert limits(certificate(coreml=float16), "coreml", None) == (0.1, pytest.approx(0.005), True)


@given(rows, arrays(np.float32, 40, elements=st.floats(-0.5, 0.5, width=32)))
def test_logits_within_a_largest_difference_are_within_its_kl(before, noise):
    assert (
        full_kl(before, before + noise) <= float(np.abs((before + noise) - before.astype(float)).max()) ** 2 / 2 + 1e-9
    )


@pytest.mark.parametrize("known", [None, certificate(onnx=INT8), certificate(onnx=INT8, executorch={})])
def test_without_a_certificate_of_both_a_wide_margin_is_what_the_format_says(known):
    assert limits(known, "onnx", "executorch") == (WIDE_MARGIN, None, False)


def line(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"kind": "sequence", "index": 0, "steps": list(steps), **changes}


STEP = {"choice": 1, "token_logit": 5.0, "values": [5.0], "top": [[1, 5.0], [0, 4.0]], "log_sum": 6.0, "deviation": 1.0}
GARBAGE = {
    "no-sequence": ((), "0 sequences of 1"),
    "twice": ((line(STEP), line(STEP)), "2 sequences of 1"),
    "another": ((line(STEP, index=3),), "or in disorder"),
    "no-step": ((line(),), "sequence 1 is not to what was asked"),
    "more-steps": ((line(STEP, STEP),), "sequence 1 is not to what was asked"),
    "more-values": ((line({**STEP, "values": [1.0, 2.0]}),), "sequence 1 is not to what was asked"),
    "steps": ((line(steps=7),), "'steps'"),
    "choice": ((line({**STEP, "choice": -1}),), r"'steps\.0\.choice'"),
    "text": ((line({**STEP, "log_sum": "6"}),), r"'steps\.0\.log_sum'"),
    "nan": ((line({**STEP, "log_sum": math.nan}),), r"'steps\.0\.log_sum'"),
    "missing": ((line({"choice": 1}),), r"'steps\.0\.values'"),
    "one-of-two": ((line({**STEP, "top": [[1, 5.0]]}),), r"'steps\.0\.top'"),
    "top": ((line({**STEP, "top": [1, 5.0]}),), r"'steps\.0\.top\.0'"),
}


@pytest.mark.parametrize("case", GARBAGE)
def test_an_answer_that_is_none_names_the_device(case):
    lines, says = GARBAGE[case]
    with pytest.raises(UnavailableError, match=f"^adb:1: .*{says}"):
        read_replay("adb:1", [sequence_of(GoldenStep(1, 0.5))], Outcome(lines))


def test_a_newer_agent_may_tell_more():
    steps = read_replay("d", [sequence_of(GoldenStep(1, 0.5))], Outcome((line({**STEP, "new": 1}),)))
    assert steps[0][0].numbers == Numbers([5.0], 6.0, 1.0)
