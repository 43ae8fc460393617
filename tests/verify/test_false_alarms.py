"""Correct artifacts are never refused: seeds of every architecture through every target, all levels."""

import dataclasses

import pytest

from pocketlm_export.options import ExportOptions
from pocketlm_export.pipeline import export_bundle
from tests.tiny_models import ROWS, write_checkpoint

ARCHITECTURES = {row.model_type: row for row in ROWS}  # the last row of each: windows, biases, odd sizes
SEEDS = range(20)


@pytest.mark.long
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_twenty_seeds_verify(model_type, tmp_path):
    alarms = []
    for seed in SEEDS:
        row = ARCHITECTURES[model_type]
        checkpoint = tmp_path / str(seed)
        write_checkpoint(dataclasses.replace(row, name=f"{row.name}, seed {seed}"), checkpoint)
        options = ExportOptions(store=tmp_path / "store", verify=False)
        bundle = export_bundle(str(checkpoint), tmp_path / f"{seed}.pocketlm", options)
        import pocketlm

        alarms += [f"seed {seed}: {words}" for words in pocketlm.verify(bundle, reference=checkpoint).failures]
    assert alarms == []
