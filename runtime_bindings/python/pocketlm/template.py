"""A model's chat template: messages in, the prompt's text out."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

import jinja2

from pocketlm.errors import BundleError, InputError, TemplateError
from pocketlm.sandbox import TemplateEnvironment
from pocketlm.template_budget import Budget, spending
from pocketlm.tokenizer import read_special_tokens, read_tokenizer_config

__all__ = ["ChatTemplate"]

_LARGEST_SOURCE = 1 << 20
_PROBE = "d5c2f0"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Refused(jinja2.TemplateError):
    """Raised by a template's own ``raise_exception``."""


class ChatTemplate:
    """The chat templates of a model, rendered as transformers' ``apply_chat_template`` does, in a bounded sandbox."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], *, source: str) -> None:
        """``templates``: name to text, the usual one is ``"default"``. ``source`` is what errors call them."""
        if not templates:
            raise TemplateError(f"{source}: no chat template")
        self.templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._source = source
        self._environment = TemplateEnvironment()
        self._compiled: dict[str, jinja2.Template] = {}
        self._forms: dict[str, tuple[bool, bool]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Self | None:
        """The templates of a folder with a tokenizer, None if it has none.

        ``chat_template.jinja`` and ``additional_chat_templates/*.jinja`` win over tokenizer_config.json's
        ``chat_template``, a text or a list of ``{"name", "template"}``. Raises :class:`BundleError` naming the file.
        """
        configuration = read_tokenizer_config(folder)
        special_tokens = read_special_tokens(folder, configuration)
        main = Path(folder) / "chat_template.jinja"
        additional = sorted((Path(folder) / "additional_chat_templates").glob("*.jinja"))
        templates = {"default": _read(main)} if main.exists() else {}
        templates |= {path.stem: _read(path) for path in additional}
        if templates:
            return cls(templates, special_tokens, source=str(main))
        source = f"{Path(folder) / 'tokenizer_config.json'}: chat_template"
        templates = _named_templates(configuration.get("chat_template"), source)
        return cls(templates, special_tokens, source=source) if templates else None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, object] | None = None,
        template: str | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt's text; encode it without adding special tokens.

        ``content`` is a text, or a list of ``{"type": "text", "text": ...}`` that is joined by line breaks where the
        template expects a text. ``arguments`` are the template's own, such as ``tools``, ``documents`` or
        ``enable_thinking``, of JSON's types. ``template`` picks one by name; without it ``"tool_use"`` serves where
        there are tools. ``now`` is the time for templates that write the date. Raises :class:`TemplateError` if the
        template refuses the messages, is malformed or does not end, :class:`InputError` for what isn't JSON.
        """
        given = dict(arguments or {})
        reserved = {"messages", "add_generation_prompt"} & given.keys()
        if reserved:
            raise InputError(f"{', '.join(sorted(reserved))} can't be an argument of the template")
        name = template or ("tool_use" if given.get("tools") and "tool_use" in self.templates else "default")
        variables = {"tools": None, "documents": None, **self._special_tokens, **_plain(given, "template arguments")}
        variables["add_generation_prompt"] = add_generation_prompt
        plain = [_with_reasoning_names(message) for message in _plain(list(messages), "messages")]
        with spending(Budget()):
            return self._render(name, self._with_expected_content(name, plain), variables, now)

    def _render(self, name: str, messages: list[Any], variables: Mapping[str, Any], now: datetime | None) -> str:
        try:
            return self._template(name).render(
                **variables,
                messages=messages,
                raise_exception=_raise_exception,
                strftime_now=lambda pattern: (now or datetime.now()).strftime(pattern),
            )
        except TemplateError:
            raise
        except _Refused as error:
            raise TemplateError(f"{self._source}: the template refuses: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{self._source}: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template can raise whatever Python's operators raise
            raise TemplateError(f"{self._source}: can't be rendered: {error or type(error).__name__}") from error

    def _template(self, name: str) -> jinja2.Template:
        if name not in self.templates:
            raise TemplateError(f"{self._source}: no template {name!r}; valid: {', '.join(sorted(self.templates))}")
        if name not in self._compiled:
            if len(self.templates[name]) > _LARGEST_SOURCE:
                raise TemplateError(f"{self._source}: the template is longer than {_LARGEST_SOURCE:,} characters")
            self._compiled[name] = self._environment.from_string(self.templates[name])
        return self._compiled[name]

    def _takes(self, name: str, content: object) -> bool:
        """Whether a user's message with this content shows in the text, and not as a printed list."""
        variables = {"tools": None, "documents": None, **self._special_tokens, "add_generation_prompt": False}
        try:
            text = self._render(name, [{"role": "user", "content": content}], variables, None)
        except TemplateError:
            return False
        return _PROBE in text and not re.search(r"""['"]type['"]""", text)

    def _with_expected_content(self, name: str, messages: list[Any]) -> list[Any]:
        if name not in self._forms:
            self._forms[name] = (self._takes(name, _PROBE), self._takes(name, _parts(_PROBE)))
        takes_text, takes_parts = self._forms[name]
        if takes_text == takes_parts:
            return messages
        convert = _joined if takes_text else _parts
        return [
            {**message, "content": convert(message["content"])} if message.get("content") is not None else message
            for message in messages
        ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: can't be read ({error})") from error


def _named_templates(value: object, source: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = [{"name": name, "template": text} for name, text in value.items()] if isinstance(value, dict) else value
    templates: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise BundleError(f"{source}: must be a text or a list of objects with name and template")
        templates[name] = text
    return templates


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _with_reasoning_names(message: Any) -> dict[str, Any]:
    # A message's reasoning has three names; templates read the first, gpt-oss the second.
    if not isinstance(message, dict):
        raise InputError(f"a message must be an object with a role, not {message!r}")
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _joined(content: object) -> object:
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
    other = next((kind for kind in kinds if kind != "text"), None)
    if other is not None:
        raise InputError(f"a message's content holds a part of type {other!r}; this model's template takes text only")
    return "\n".join(str(part.get("text", "")) for part in content)


def _plain(value: Any, where: str) -> Any:
    """A copy in JSON's types, so that no object's methods reach the template."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    try:
        if isinstance(value, Mapping):
            return {_plain(key, where): _plain(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [_plain(item, where) for item in value]
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply") from error
    raise InputError(f"{where}: a {type(value).__name__} is none of JSON's types")
