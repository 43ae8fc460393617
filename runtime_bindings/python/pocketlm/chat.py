"""A conversation: the model's chat template, then generation."""

from collections.abc import Iterator, Mapping, Sequence

from pocketlm.errors import InputError, UnsupportedError
from pocketlm.generate import Observer, Piece, bundle_of, stream
from pocketlm.sampling import Sampling
from pocketlm.session import Session, TextBundle

__all__ = ["chat"]

# A template of a multimodal model would write a placeholder for it, and no bundle has the part that fills it.
NOT_TEXT = ("image", "image_url", "audio", "input_audio", "video")


def chat(
    session_or_bundle: Session | TextBundle,
    messages: Sequence[Mapping[str, object]],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    observer: Observer | None = None,
    **template_arguments: object,
) -> Iterator[Piece]:
    """The model's answer to ``messages``, as :func:`pocketlm.generate` gives it.

    A message is ``{"role": ..., "content": ...}``; the content is a text or a list of text parts. Other keywords go
    to the template (``tools=...``, ``enable_thinking=False``). Pass the whole conversation every time: a session runs
    only what is new. Raises :class:`InputError` for malformed messages, :class:`TemplateError` where the template
    refuses them, :class:`UnsupportedError` for a model without a template.
    """
    _check_messages(messages)
    bundle = bundle_of(session_or_bundle)
    if bundle.chat_template is None:
        raise UnsupportedError("this model has no chat template: use generate, or run with --raw")
    text = bundle.chat_template.render(messages, arguments=template_arguments)
    sampling = Sampling.resolve(
        bundle.default_sampling,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    prompt = bundle.tokenizer.encode(text, add_special_tokens=False)
    return stream(
        session_or_bundle,
        prompt,
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        continues_prompt=False,
        observer=observer,
    )


def _check_messages(messages: Sequence[Mapping[str, object]]) -> None:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError('messages must be a non-empty list such as [{"role": "user", "content": "..."}]')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{index}] must be an object with role and content, not {message!r}")
        if not isinstance(message.get("role"), str):
            raise InputError(f"messages[{index}]: the role must be a text such as 'user', not {message.get('role')!r}")
        content = message.get("content")
        if content is None and message.keys() > {"role"}:
            continue  # a turn that only calls tools
        if not isinstance(content, str | list | tuple):
            raise InputError(f"messages[{index}]: the content must be a text or a list of parts, not {content!r}")
        for part in [] if isinstance(content, str) else content:
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise InputError(f"messages[{index}]: a part must be an object with a type, not {part!r}")
            if part["type"] in NOT_TEXT:
                raise InputError(f"messages[{index}]: a part of type {part['type']!r}: bundles take text alone")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise InputError(f"messages[{index}]: a part of type text must have a text, not {part.get('text')!r}")
