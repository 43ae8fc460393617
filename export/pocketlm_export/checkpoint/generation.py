"""Stop ids and default sampling, from generation_config.json, config.json and the tokenizer's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketlm_export.fields import Fields

__all__ = ["Generation", "read_generation"]

SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
LARGEST_FACTOR = 1e6  # of a temperature or penalty; what is larger is an error of whoever wrote the file


@dataclass(frozen=True, slots=True)
class Generation:
    """``stop_ids`` in ascending order; ``sampling`` holds only the keys that the checkpoint states."""

    stop_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None
    sampling: Mapping[str, Any]


def read_generation(config: Fields, generation: Fields | None, vocabulary_size: int) -> Generation:
    """Stop ids are the union of both files': fine-tunes change one and forget the other."""
    stop: set[int] = set()
    for fields in (config, generation):
        if fields is not None:
            stop.update(_ids(fields, "eos_token_id", vocabulary_size))
    first = generation if generation is not None and generation.value("bos_token_id") is not None else config
    sampling = {}
    if generation is not None:
        for key in SAMPLING_KEYS:
            value = _sampling_value(generation, key)
            if value is not None:
                sampling[key] = value
    bos, pad = _ids(first, "bos_token_id", vocabulary_size), _ids(config, "pad_token_id", vocabulary_size)
    return Generation(tuple(sorted(stop)), bos[0] if bos else None, pad[0] if pad else None, sampling)


def _sampling_value(fields: Fields, key: str) -> bool | int | float | None:
    if fields.value(key) is None:
        return None
    if key == "do_sample":
        return fields.flag(key, False)
    if key == "top_k":
        return fields.integer(key, 0, least=0)
    if key == "repetition_penalty":
        return fields.number(key, 1.0, most=LARGEST_FACTOR)
    return fields.number(key, 1.0, least=0, most=1 if key in ("top_p", "min_p") else LARGEST_FACTOR)


def _ids(fields: Fields, key: str, vocabulary_size: int) -> list[int]:
    value = fields.value(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int):
            raise fields.refuse(key, "must be a token id or a list of token ids")
    # -1 and ids past the rows (a pad token that was never added) can't be produced, so they can't stop anything.
    return [item for item in ids if 0 <= item < vocabulary_size]
