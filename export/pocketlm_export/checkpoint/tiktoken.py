"""A tiktoken vocabulary as a tokenizer of the ``tokenizers`` library.

The file has one token a line: its bytes in base64, a space, its rank, which is its id; ranks count from 0
(https://github.com/openai/tiktoken, ``load.py``). How a text is cut before, and the special tokens, are not in
it.
"""

import base64
import binascii
import stat
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pocketlm.errors import CheckpointError

__all__ = ["make_tokenizer", "read_ranks"]

LARGEST_FILE = 64 << 20
LONGEST_TOKEN = 1024  # bytes; the longest of cl100k_base has 128


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens to ids, in the order of the ids. Raises :class:`CheckpointError` naming the file and the line."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size > LARGEST_FILE:
            raise CheckpointError(f"{path}: {status.st_size} bytes are too many for a vocabulary")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        token = _token(line, len(ranks))
        if token is None:
            raise CheckpointError(f"{path}:{number}: not a token in base64 and its rank {len(ranks)}: {_shown(line)}")
        if token in ranks:
            raise CheckpointError(f"{path}:{number}: the token of rank {ranks[token]} again")
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(f"{path}: no token for byte {missing[0]} ({len(missing)} such bytes): truncated?")
    return ranks


def _token(line: bytes, rank: int) -> bytes | None:
    """The token on ``line``; None unless that is well-formed and of this rank."""
    encoded, _, stated = line.partition(b" ")
    try:
        token = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return None
    return token if 0 < len(token) <= LONGEST_TOKEN and stated == b"%d" % rank else None


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace"))[:60]


def make_tokenizer(ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]) -> Tokenizer:
    """The tokenizer that cuts a text by ``pattern`` and merges each piece as tiktoken does.

    The ids of ``special_tokens`` follow the ranks without a gap. No token is added to a text.
    """
    letters = _letters_of_bytes()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {text: ranks[token] for token, text in spelled.items()}
    # A piece that is a token is taken whole, even where no merges lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(spelled, vocabulary), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    in_order = sorted(special_tokens, key=special_tokens.__getitem__)
    assert [special_tokens[token] for token in in_order] == list(range(len(ranks), len(ranks) + len(in_order)))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in in_order])
    return tokenizer


def _merges(spelled: Mapping[bytes, str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """tiktoken joins the two neighbours whose bytes together have the lowest rank: any two tokens that make a third."""
    return [
        (text[:cut], text[cut:])
        for text in spelled.values()
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]


def _letters_of_bytes() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + count) for count in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
