"""No field of config.json is silently ignored: each is changed, emptied and removed, and transformers is the oracle.

Whatever is done to a field, either PocketLM's reference makes the logits that transformers makes (for phi3small, which
it doesn't have, the model in plain torch beside this), or it refuses the file with a message that names a key, or the
tensor that the key promised. What the oracle can't load is refused too, but for a null where transformers 5 demands a
value: older versions wrote such nulls, which say that the key is not set, so they have to mean what the file without
the key means.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pocketlm.errors import InputError
from pocketlm_export.architectures import build_graph
from pocketlm_export.checkpoint.checkpoint import open_checkpoint
from pocketlm_export.quantization.schemes import assign_rows
from pocketlm_export.quantization.store import WeightStore
from pocketlm_export.quantization.weights import quantize
from pocketlm_export.verify.reference import ReferenceSession
from tests.architectures import phi3small_model
from tests.architectures.parity import difference
from tests.tiny_models import ROWS

TOKENS = np.random.default_rng(3).integers(5, 300, 50).tolist()  # beyond every window, and LongRoPE's original context
LARGEST = 1e-4  # as in test_parity
ABSENT = object()
# Text has no other value of its kind: these keys are given one that means something else.
OTHER_TEXT = {
    "hidden_act": "gelu", "hidden_activation": "gelu", "rope_type": "linear", "dtype": "float16", "model_type": "qwen2",
    "transformers_version": "4.40.0", "_attn_implementation": "sdpa", "experts_implementation": "eager",
}  # fmt: skip
# Fields that are no part of the model, which the oracle needs nevertheless: the form of what a call returns, and an id
# below the tiny vocabulary where the class assumes a large one.
ORACLES_OWN = {("return_dict", False), ("pad_token_id", ABSENT)}
MEANING_OF_NULL = {"num_key_value_heads": "num_attention_heads"}  # everything else: as if it were absent
# The first row of each architecture in `make test`, the others in `make test-all`.
FIRST = {row.model_type: row.name for row in reversed(ROWS)}


@dataclass(frozen=True)
class Mutation:
    """Another ``value`` of the field at ``path``."""

    path: tuple[str, ...]
    value: Any

    def applied(self, config: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(config)
        place = changed
        for key in self.path[:-1]:
            place = place[key]
        if self.value is ABSENT:
            del place[self.path[-1]]
        else:
            place[self.path[-1]] = self.value
        return changed

    def __str__(self) -> str:
        return f"{'.'.join(self.path)} {'absent' if self.value is ABSENT else json.dumps(self.value)}"


def others(key: str, value: Any) -> Iterator[Any]:
    """Other values of the same kind."""
    match value:
        case bool():
            yield not value
        case int():
            yield value + 1
            yield value * 2
        case float():
            yield value * 1.5
        case str():
            yield OTHER_TEXT.get(key, "other")
        case list():
            yield value[::-1]
            yield value[:-1]
        case None:
            yield 7
            yield 0.5


def mutations(config: dict[str, Any], defaults: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Mutation]:
    for key, value in config.items():
        place = (*path, key)
        yield Mutation(place, ABSENT)
        if value is not None:
            yield Mutation(place, None)
        if isinstance(value, dict):
            yield from mutations(value, {}, place)
        for other in others(key, value):
            if other != value:
                yield Mutation(place, other)
    for key in defaults.keys() - config.keys():
        for other in others(key, defaults[key]):
            yield Mutation((*path, key), other)


def our_logits(folder: Path, store: Path) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    # LongRoPE's table is chosen by the exported context, in transformers by the tokens at hand.
    graph = build_graph(checkpoint.config, min(checkpoint.config.context_length, len(TOKENS)))
    checkpoint.check_tensors(graph.weights())
    checkpoint.check_saved_head()
    weights = quantize(checkpoint.tensors, assign_rows(graph, "fp32", "int8"), WeightStore(store))
    return ReferenceSession(graph, weights).all_logits(TOKENS)


def transformers_logits(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), return_dict=True).logits[0].double().numpy()


def plain_torch_logits(folder: Path) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    context = min(config.get("max_position_embeddings", len(TOKENS)), len(TOKENS))
    return phi3small_model.Phi3Small(config, tensors, context)(torch.tensor([TOKENS])).logits[0].double().numpy()


def problem(
    ours: np.ndarray | InputError,
    mutation: Mutation,
    config: dict[str, Any],
    folder: Path,
    oracle: Callable[[Path], np.ndarray] = transformers_logits,
) -> str | None:
    """What is wrong with how ``folder`` was taken after ``mutation`` of ``config``; None if nothing is."""
    if isinstance(ours, InputError):
        named = re.search(r"config\.json: .*'\w+'|tensor|\.weight|\.bias", str(ours))
        return None if named else f"refused without a name: {ours}"
    try:
        expected = oracle(folder)
    except Exception as error:  # noqa: BLE001  the oracle may fail in any way; what counts is that it did
        if isinstance(mutation.value, int) and not isinstance(mutation.value, bool):
            readable = Mutation(mutation.path, float(mutation.value))  # JSON has one kind of number, transformers two
        elif mutation.value is None:
            meant = MEANING_OF_NULL.get(mutation.path[-1])
            readable = Mutation(mutation.path, ABSENT if meant is None else config[meant])
        else:
            return f"taken, but the oracle refuses it: {type(error).__name__}: {str(error)[:120]}"
        write_config(folder, readable.applied(config))
        try:
            expected = oracle(folder)
        except Exception:  # noqa: BLE001
            return f"taken, but the oracle refuses it: {type(error).__name__}: {str(error)[:120]}"
    largest, _ = difference(ours, expected)
    return None if largest <= LARGEST else f"silently different: {largest:.1e} of the logits' deviation"


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in FIRST.values() else pytest.mark.long)
        for row in ROWS
        if row.outlier is None and row.residual is None
    ],
)
def test_every_field_is_honoured_neutral_or_refused_by_name(row, tiny_checkpoint, tmp_path):
    from transformers import AutoConfig

    source, _ = tiny_checkpoint(row.name)
    config = json.loads((source / "config.json").read_text())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    problems = []
    oracle, defaults = plain_torch_logits, phi3small_model.DEFAULTS
    if row.model_type != "phi3small":
        oracle, defaults = transformers_logits, AutoConfig.for_model(row.model_type).to_dict()
    for mutation in mutations(config, defaults):
        if any(mutation == Mutation((key,), value) for key, value in ORACLES_OWN):
            continue
        write_config(folder, mutation.applied(config))
        try:
            ours: np.ndarray | InputError = our_logits(folder, tmp_path / "store")
        except InputError as error:
            ours = error
        found = problem(ours, mutation, config, folder, oracle)
        if found is not None:
            problems.append(f"{mutation}: {found}")
    assert not problems, "\n".join(problems)
