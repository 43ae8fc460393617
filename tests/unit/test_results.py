"""Results: what is written reads back, and what is no result is refused by file and key."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.errors import InputError
from pocketlm.measuring.bootstrap import median_figure, ratio_figure
from pocketlm.measuring.figures import figures_of, noise_of
from pocketlm.results import BenchSettings, Energy, read_result
from tests.made_results import SETTINGS, emulated_run, result, run, sample

SCHEMA = Path(__file__).parents[2] / "runtime_bindings" / "schema" / "result.schema.json"
RESULT = result(run([sample(10), sample(20, cold=True)]), emulated_run())
positive = st.floats(1e-6, 1e9)


def test_a_result_reads_back(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(RESULT.to_json())
    assert read_result(path) == RESULT
    jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA.read_text()))


def _set(*place: Any, to: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in place[:-1]:
            document = document[key]
        document[place[-1]] = to

    return change


WRONG = [
    (_set("format_version", to="2.0"), "'format_version' is '2.0'; this release reads results of 1.x"),
    (_set("format_version", to=1), "'format_version' is 1"),
    (_set("kind", to="sweep"), "'kind' is 'sweep'; valid: bench"),
    (_set("kind", to=["bench"]), "'kind' is"),
    (_set("more", to=1), "'more'"),
    (_set("runs", to=[]), "'runs'"),
    (_set("runs", 0, "samples", to=[]), "no samples"),
    (_set("runs", 0, "samples", 0, "load_seconds", to=-1.0), "'runs.0.samples.0.load_seconds'"),
    (_set("runs", 0, "samples", 0, "load_seconds", to="1"), "'runs.0.samples.0.load_seconds'"),
    (_set("runs", 0, "samples", 0, "load_seconds", to=math.nan), "'runs.0.samples.0.load_seconds'"),
    (_set("runs", 0, "samples", 0, "decode_seconds", to=[]), "'runs.0.samples.0.decode_seconds'"),
    (_set("runs", 0, "samples", 0, "memory", "peak", "anonymous", to=1.5), "'runs.0.samples.0.memory.peak.anonymous'"),
    (_set("runs", 0, "samples", 0, "energy", "decode_joules", to=1.0), "joules need the method"),
    (_set("runs", 0, "figures", "load_seconds", "low", to=1e9), "the median lies outside its interval"),
    (_set("runs", 0, "top1", "agreement", to=None), "needs either an agreement or the reason"),
    (_set("runs", 0, "top1", "agreement", to=1.5), "'runs.0.top1.agreement'"),
    (_set("runs", 0, "runtime", "name", to="tflite"), "'runs.0.runtime.name'"),
    (_set("runs", 1, "device", "emulated", to=False), "no samples"),
    (_set("runs", 0, "device", "emulated", to=True), "an emulated device has neither speed nor memory"),
    (_set("bundle", "manifest_sha256", to="c"), "'bundle.manifest_sha256'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_no_result_is_refused_by_file_and_key(change, message, tmp_path):
    document = json.loads(RESULT.to_json())
    change(document)
    path = tmp_path / 'it\'s a "result"; $HOME.json'
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        read_result(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def _keys(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if place[-1:] not in (("facts",), ("files",)):  # any name is good there
                yield (*place, key)
            yield from _keys(item, (*place, key))
    elif isinstance(value, list):
        yield from _keys(value[0] if value else None, (*place, 0))


@pytest.mark.parametrize(
    "place", list(_keys(json.loads(RESULT.to_json()))), ids=lambda place: ".".join(map(str, place))
)
def test_every_key_is_needed(place, tmp_path):
    document = json.loads(RESULT.to_json())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=place[-1] if isinstance(place[-1], str) else "samples"):
        read_result(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"kind": 1, "kind": 1}', b"\xff", b"[" * 5000, b"{}"])
def test_what_is_no_object_is_refused(content, tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"result\.json: "):
        read_result(path)
    with pytest.raises(InputError, match=r"nowhere\.json: can't be read"):
        read_result(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="can't be read"):
        read_result(tmp_path)


def test_figures_are_those_of_their_samples():
    settings = BenchSettings(prompt_tokens=8, new_tokens=3, depth=4)
    counted = Energy(method="a meter", prefill_joules=4.0, decode_joules=3.0)
    warm = [sample(rate, load_seconds=rate / 10, depth_seconds=1.0, energy=counted) for rate in (10.0, 30.0, 20.0)]
    figures = figures_of([*warm, sample(99, cold=True, load_seconds=7.0)], settings)
    assert figures.decode_tokens_per_second.median == pytest.approx(20)
    assert (figures.load_seconds.median, figures.load_seconds.low, figures.load_seconds.high) == (2.0, 1.0, 3.0)
    assert (figures.cold_load_seconds.median, figures.cold_load_seconds.low) == (7.0, 7.0)
    assert figures.prefill_tokens_per_second.median == 80
    assert figures.prefill_joules_per_token.median == 0.5
    assert figures.decode_joules_per_token.median == 1.5
    assert figures.depth_seconds.median == 1.0
    assert figures.peak_anonymous.median == 1_000_000
    assert figures.added_anonymous is None, "not every sample tells"
    assert figures_of(warm, SETTINGS).depth_seconds is None, "nothing was filled"
    assert figures_of([sample(), sample(energy=counted)], SETTINGS).decode_joules_per_token is None


def test_a_run_is_noisy_if_others_kept_a_tenth_of_a_core_busy():
    assert not list(noise_of([sample(others_cores=0.1), sample(others_cores=None)]))
    (words,) = noise_of([sample(others_cores=0.4), sample(others_cores=0.0)])
    assert words == "others kept up to 0.4 cores busy in 1 of 2 repetitions"


@given(st.lists(positive, min_size=1, max_size=12))
def test_an_interval_contains_the_median_and_lies_within_the_samples(values):
    figure = median_figure(values)
    assert figure == median_figure(values), "the seed is fixed"
    assert min(values) <= figure.low <= figure.median <= figure.high <= max(values)


@given(st.lists(positive, min_size=1, max_size=8), st.lists(positive, min_size=1, max_size=8))
def test_the_interval_of_a_ratio_contains_the_ratio_of_the_medians(base, other):
    figure = ratio_figure(base, other)
    assert figure.low <= figure.median <= figure.high
    assert figure.low >= min(other) / max(base) * (1 - 1e-12)
    assert figure.high <= max(other) / min(base) * (1 + 1e-12)


@given(st.lists(positive, min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_a_result_against_itself_is_one_and_a_scaled_one_is_the_scale(values, scale):
    assert ratio_figure(values, values).median == 1
    assert ratio_figure(values, [value * scale for value in values]).median == pytest.approx(scale)


def test_equal_samples_leave_no_doubt():
    figure = median_figure([3.0] * 5)
    assert (figure.low, figure.median, figure.high) == (3.0, 3.0, 3.0)
