"""Text to token ids and back, over the folder of a bundle that holds the tokenizer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers

from pocketlm.errors import BundleError, InputError
from pocketlm.strict_json import parse_object

__all__ = ["Tokenizer", "read_special_tokens", "read_tokenizer_config"]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library with the special tokens of ``tokenizer_config.json``.

    A chat template writes the special tokens itself, the beginning of the text included: encode what it rendered with
    ``add_special_tokens=False``. Text that no template has seen is encoded with ``add_special_tokens=True``.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        """``special_tokens``: from ``"bos_token"``, ``"eos_token"``... to the token's text."""
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = dict(special_tokens)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read ``tokenizer.json`` and ``tokenizer_config.json``, if there is one; :class:`BundleError` names the file.

        As in transformers, the post-processor of ``tokenizer.json`` decides which special tokens are added, whatever
        ``add_bos_token`` of the configuration says.
        """
        path = Path(folder) / "tokenizer.json"
        try:
            with _panics_reported(str(path)):
                backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
                backend.encode("a", add_special_tokens=True)
        except BundleError:
            raise
        except OSError as error:
            raise BundleError(f"{path}: can't be read ({error.strerror})") from error
        except Exception as error:  # the library raises bare Exceptions
            raise BundleError(f"{path}: not a tokenizer of the tokenizers library ({error})") from error
        configuration = read_tokenizer_config(folder)
        return cls(backend, read_special_tokens(folder, configuration))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of ``text``; text that spells a special token becomes that token."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode at character {error.start}: a lone surrogate") from error
        with _panics_reported("tokenizer.json"):
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; ids without a token have none, bytes that are no UTF-8 become U+FFFD."""
        with _panics_reported("tokenizer.json"):
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def vocabulary_size(self) -> int:
        """The largest id plus one; the model may have more rows."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def tokens_from(self, first_id: int) -> list[str]:
        """The tokens whose ids are ``first_id`` or larger, in the order of their ids."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return sorted((token for token, at in vocabulary.items() if at >= first_id), key=vocabulary.__getitem__)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that ``skip_special_tokens`` leaves out."""
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id, None where there is none."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, None where there is none."""
        return self._backend.token_to_id(token)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The tokens ``<0x00>``..``<0xFF>`` that the decoder joins to characters; empty without byte fallback."""
        decoder = json.loads(self._backend.decoder.__getstate__()) if self._backend.decoder else {}
        kinds = {decoder.get("type")} | {part.get("type") for part in decoder.get("decoders", ())}
        if "ByteFallback" not in kinds:
            return frozenset()
        names = [f"<0x{byte:02{case}}>" for byte in range(256) for case in "Xx"]
        return frozenset(token_id for name in names if (token_id := self.token_id(name)) is not None)


@contextmanager
def _panics_reported(source: str) -> Iterator[None]:
    """Turn a panic of the library's Rust code, which is not an Exception, into a :class:`BundleError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{source}: the tokenizers library fails with it: {error}") from error


def read_tokenizer_config(folder: str | Path) -> dict[str, object]:
    """The object in the folder's ``tokenizer_config.json``; empty where there is no such file."""
    path = Path(folder) / "tokenizer_config.json"
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise BundleError(f"{path}: not a valid JSON object: {str(error)[:100]}") from error


def read_special_tokens(folder: str | Path, configuration: Mapping[str, object]) -> dict[str, str]:
    """``bos_token``, ``eos_token``... of a tokenizer_config.json, each a plain text or an object with ``content``."""
    source = Path(folder) / "tokenizer_config.json"
    return {
        name: _token_text(configuration[name], f"{source}: {name}")
        for name in _SPECIAL_TOKENS
        if configuration.get(name) is not None
    }


def _token_text(value: object, where: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BundleError(f"{where}: a token is a string or an object with a string as its content, not {value!r}")
    return text
