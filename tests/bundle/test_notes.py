"""What the exported context decides is said in every artifact's notes."""

import pytest


@pytest.mark.parametrize("target", ("onnx", "executorch", "coreml"))
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("phi3-short-rope", "LongRoPE: short factors, for contexts of up to 160"),
        ("phi3-long-rope", "LongRoPE: long factors from the first token, as the context of 160 exceeds 40"),
        ("gemma2-no-caps", "sliding window 1000 dropped: the context of 160 fits into it"),
    ],
)
def test_notes_say_what_the_context_decided(row, words, target, tiny_bundle):
    notes = tiny_bundle(row, "fp32", target).manifest.targets[target].notes
    assert [note for note in notes if note.startswith(words)], notes
