"""The tokenizer's files in a vendor's folder: the model's own bytes, but for what that vendor's code gets wrong.

A rewrite says the same in other words: the ``tokenizers`` library makes the same tokens of it, and the vendor's code
fewer wrong ones. What no rewrite reaches is counted in the certificate.
"""

import json
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["write_tokenizer_files"]

Json = dict[str, Any]

# The split of ByteLevel(use_regex=True), as the tokenizers library has it.
BYTE_LEVEL_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Rewrite:
    """``trouble``: what the vendor's code does wrong, and what stands there instead, for people. ``apply`` changes the
    content of tokenizer.json, and says whether there was anything to change."""

    trouble: str
    apply: Callable[[Json], bool]


def write_tokenizer_files(target: str, files: Mapping[str, Path], folder: Path) -> tuple[str, ...]:
    """Write into ``folder`` those of the tokenizer's ``files`` that ``target``'s vendor reads.

    Returns a note on each rewrite; without one, the copy is the file's very bytes.
    """
    for name in READ[target] & files.keys():
        # A copy: a hard link would share its mode and later edits with the checkpoint.
        shutil.copyfile(files[name], folder / name)
    path = folder / "tokenizer.json"
    if not path.exists():
        return ()
    content = json.loads(path.read_bytes())
    troubles = [rewrite.trouble for rewrite in REWRITES[target] if rewrite.apply(content)]
    if troubles:
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    return tuple(f"{target}/tokenizer.json is rewritten: {trouble}" for trouble in troubles)


def _compose_by_replacement(content: Json) -> bool:
    normalizer = content.get("normalizer")
    if not isinstance(normalizer, dict):
        return False
    if normalizer.get("type") == "NFC":
        content["normalizer"] = _compositions()
        return True
    parts = normalizer.get("normalizers") or []
    places = [place for place, part in enumerate(parts) if part.get("type") == "NFC"]
    for place in places:
        parts[place] = _compositions()
    return bool(places)


def _compositions() -> Json:
    """NFC as replacements of two characters by one, or of one by what NFC spells it as.

    Text in NFC stays as it is, and any text stays canonically equivalent. What replacements can't do remains as it
    was: marks in an unusual order, and Hangul in parts (it would take 11,172 of them). Only the Basic Multilingual
    Plane, whose compositions have not changed since Unicode 6.1: whichever Python exports, the bytes are the same.
    """
    respelled: dict[str, str] = {}
    composed: dict[str, str] = {}
    for character in map(chr, range(0x10000)):
        decomposition = unicodedata.decomposition(character)
        if not decomposition or decomposition.startswith("<"):  # "<": not a canonical one
            continue
        normal = unicodedata.normalize("NFC", character)
        if normal == character:
            composed["".join(chr(int(code, 16)) for code in decomposition.split())] = character
        else:
            respelled[character] = normal
    # Two marks on one letter, the inner one last: â and a dot below are ậ too.
    marks = {pair[1] for pair in composed if unicodedata.combining(pair[1])}
    for letter in sorted(composed.values()):
        for mark in sorted(marks):
            normal = unicodedata.normalize("NFC", letter + mark)
            if len(normal) == 1:
                composed[letter + mark] = normal
    # A letter with two marks comes after the letter with one, which it is made from.
    ordered = sorted(composed.items(), key=lambda rule: len(unicodedata.normalize("NFD", rule[1])))
    return {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": pattern}, "content": replacement}
            for pattern, replacement in (*respelled.items(), *ordered)
        ],
    }


def _merges_as_pairs(content: Json) -> bool:
    model = content["model"]
    merges = model.get("merges") or []
    if not any(isinstance(merge, str) and "\r" in merge for merge in merges):
        return False
    model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return True


def _digits_as_split(content: Json) -> bool:
    parts = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    kinds = [part.get("type") for part in parts]
    # A space before every part can't be said with splits.
    if "Digits" not in kinds or any(part.get("add_prefix_space") for part in parts):
        return False
    rewritten: list[Json] = []
    for part in parts:
        if part.get("type") == "Digits":
            rewritten.append(_isolated(r"\p{N}" if part.get("individual_digits") else r"\p{N}+"))
        elif part.get("type") == "ByteLevel" and part.get("use_regex", True):
            # Where there is a Split, genai takes ByteLevel for one that doesn't split.
            rewritten += [_isolated(BYTE_LEVEL_SPLIT), {**part, "use_regex": False}]
        else:
            rewritten.append(part)
    content["pre_tokenizer"]["pretokenizers"] = rewritten
    return True


def _isolated(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


READ: Mapping[str, frozenset[str]] = {
    "onnx": frozenset({"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}),
    "executorch": frozenset({"tokenizer.json"}),
}
REWRITES: Mapping[str, tuple[Rewrite, ...]] = {
    "onnx": (
        Rewrite("onnxruntime-genai drops carriage returns from merges, unless they are pairs", _merges_as_pairs),
        Rewrite("onnxruntime-genai does not split digits, unless by a pattern", _digits_as_split),
    ),
    "executorch": (
        Rewrite(
            "ExecuTorch's tokenizer drops accents where NFC is asked for; replacements compose letters instead",
            _compose_by_replacement,
        ),
    ),
}
