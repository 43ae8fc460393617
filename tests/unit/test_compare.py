"""Two results beside each other: which runs are pairs, what their ratios are, and what a gate says of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import InputError
from pocketlm.measuring.comparison import FIGURES, compare
from pocketlm.measuring.gate import GROUPS, Gate, judge, parse_gates
from pocketlm.results import BenchSettings, DeviceRecord, Top1
from tests.made_results import emulated_run, result, run, sample

NAMES = ("a.json", "b.json")
gates = st.builds(
    Gate,
    figure=st.sampled_from((*FIGURES, *GROUPS)),
    operator=st.sampled_from((">=", "<=")),
    limit=st.decimals("0.001", "1000", places=3).map(float),
)


def phone(serial: str) -> DeviceRecord:
    return DeviceRecord(address=f"adb:{serial}", emulated=False, facts={})


def ratios(pair) -> dict:
    return {ratio.figure: ratio.ratio.median for ratio in pair.ratios}


def test_runs_are_paired_by_device_runtime_and_depth():
    deeper = BenchSettings(prompt_tokens=8, new_tokens=3, depth=512)
    a = result(run([sample(10)]), run([sample(5)], settings=deeper), emulated_run(), emulated_run(profile="max"))
    b = result(emulated_run(decode=100), run([sample(20)]), run([sample(5)], packed=True))
    comparison = compare(a, b, NAMES)
    assert [pair.name for pair in comparison.pairs] == [
        "onnx on host, depth 0",
        "onnx on qemu:arm64@cortex-a76, depth 0",
    ]
    host, emulated = comparison.pairs
    assert ratios(host)["decode"] == pytest.approx(2)
    assert ratios(host)["anonymous"] == 1
    assert ratios(emulated) == {"prefill_instructions": 1, "decode_instructions": 0.5, "top1": 1}
    assert comparison.unpaired == [
        "only in a.json: onnx on host, depth 512",
        "only in a.json: onnx on qemu:arm64@max, depth 0",
        "only in b.json: onnx on host, depth 0, packed",
    ]


def test_a_phone_may_be_another_unless_there_are_several():
    one, other = run([sample()], device=phone("1")), run([sample()], device=phone("2"))
    (pair,) = compare(result(one), result(other), NAMES).pairs
    assert pair.name == "onnx on adb, depth 0"
    assert pair.differences == ["device: adb:1 in A, adb:2 in B"]
    pairs = compare(result(one, other), result(other), NAMES).pairs
    assert [pair.name for pair in pairs] == ["onnx on adb:2, depth 0"]
    with pytest.raises(InputError, match=r"no run of a\.json has a counterpart in b\.json: .*adb.* and .*host"):
        compare(result(one), result(run([sample()])), NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 2}, "'threads' is 1 in the first and 2 in the second"),
        ({"cores": [0]}, "'cores' is None in the first"),
        ({"settings": BenchSettings(prompt_tokens=9, new_tokens=3, depth=0)}, "'prompt_tokens' is 8"),
        ({"settings": BenchSettings(prompt_tokens=8, new_tokens=4, depth=0)}, "'new_tokens' is 3"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(changes, message):
    with pytest.raises(InputError, match=message):
        compare(result(run([sample()])), result(run([sample()], **changes)), NAMES)


def test_noise_other_tokens_and_other_circumstances_are_told():
    b = run([sample()], tokens_sha256="f" * 64, noisy=["others were busy"], features="avx2 avx512f")
    (pair,) = compare(result(run([sample()])), result(b), NAMES).pairs
    assert pair.noisy == ["B: others were busy"]
    assert pair.same_tokens is False
    assert pair.differences == ["CPU features: avx2 in A, avx2 avx512f in B"]
    (pair,) = compare(result(run([sample()], tokens_sha256=None)), result(b), NAMES).pairs
    assert pair.same_tokens is None


def test_what_only_one_result_has_is_lost_and_nothing_is_a_multiple_of_0():
    unknown = Top1(agreement=None, positions=0, reason="no answers")
    (pair,) = compare(result(run([sample()])), result(run([sample()], top1=unknown)), NAMES).pairs
    assert pair.lost == ["top1"]
    none = Top1(agreement=0.0, positions=10, reason=None)
    (pair,) = compare(result(run([sample()], top1=none)), result(run([sample()])), NAMES).pairs
    assert "top1" not in [*ratios(pair), *pair.lost]


@given(st.lists(gates, min_size=1, max_size=5))
def test_gates_read_back(made):
    assert parse_gates(",".join(map(str, made))) == tuple(made)
    assert parse_gates(" , ".join(f"{gate.figure} {gate.operator} {gate.limit:g}" for gate in made)) == tuple(made)


@given(st.text(max_size=30))
def test_whatever_else_is_refused_as_a_gate(text):
    try:
        parse_gates(text)
    except InputError as error:
        assert str(error).startswith("--gate ")
    else:
        assert all("=" in part for part in text.split(","))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be FIGURE>=NUMBER"),
        ("decode", "must be FIGURE>=NUMBER"),
        ("decode>0.9", "must be FIGURE>=NUMBER"),
        ("decode>=", "must be FIGURE>=NUMBER"),
        ("decode>=0.9,", "must be FIGURE>=NUMBER"),
        ("decode>=1e3", "must be FIGURE>=NUMBER"),
        ("decode>=-1", "must be FIGURE>=NUMBER"),
        ("decode>=0", "must be a positive number"),
        ("speed>=0.9", "unknown figure; valid: load, .*decode, .*arm64_instructions"),
    ],
)
def test_what_is_no_gate_is_refused_by_name(text, message):
    with pytest.raises(InputError, match=message):
        parse_gates(text)


def verdicts(a, b, text: str) -> list:
    return judge(compare(result(*a), result(*b), NAMES), parse_gates(text))


def test_a_gate_fails_on_the_wrong_side_of_its_limit_and_passes_on_it():
    a, b = [run([sample(10)])], [run([sample(9)])]
    assert [verdict.passed for verdict in verdicts(a, b, "decode>=0.95,decode>=0.89,decode<=0.95,anonymous<=1")] == [
        False, True, True, True,
    ]  # fmt: skip
    (failed,) = verdicts(a, b, "decode>=0.95")
    assert failed.words == "onnx on host, depth 0: decode is 0.9000, limit decode>=0.95"


def test_arm64_instructions_are_those_of_prefill_and_of_decode():
    both = verdicts([emulated_run()], [emulated_run(prefill=801, decode=220)], "arm64_instructions<=1.01")
    assert [(verdict.ratio.figure, verdict.passed) for verdict in both] == [
        ("prefill_instructions", True), ("decode_instructions", False),
    ]  # fmt: skip


def test_an_interval_that_includes_the_limit_leaves_the_verdict_uncertain():
    wide = [run([sample(rate) for rate in (8, 10, 12)])]
    (verdict,) = verdicts(wide, wide, "decode>=0.95")
    assert verdict.passed
    assert verdict.uncertain
    (verdict,) = verdicts(wide, [run([sample(30)], noisy=["others were busy"])], "decode>=0.95")
    assert not verdict.uncertain
    assert verdict.words.endswith("noisy")


def test_a_gate_without_its_figure_is_refused_by_name():
    with pytest.raises(InputError, match=r"--gate arm64_instructions<=1\.01: no pair of runs has prefill_instructions"):
        verdicts([run([sample()])], [run([sample()])], "arm64_instructions<=1.01")
    cold = [run([sample(), sample(cold=True)])]
    with pytest.raises(InputError, match="--gate cold_load<=1: onnx on host, depth 0: only one of the results has it"):
        verdicts(cold, [run([sample()])], "cold_load<=1")
