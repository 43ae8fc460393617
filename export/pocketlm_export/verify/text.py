"""Conformance of tokenizers and templates: the bundle's golden vectors through PocketLM's own code and the vendors'."""

import importlib.metadata
import importlib.util
import unicodedata
from collections.abc import Sequence
from typing import Literal

from pocketlm.bundle import Bundle
from pocketlm.certificate import TextConformance
from pocketlm.errors import PocketLMError
from pocketlm.tokenizer import Tokenizer
from pocketlm_export.verify.golden_questions import GOLDEN_FILES, Answer, Chat, Kind, Question, Refused, read_questions
from pocketlm_export.verify.vendor_text import VENDORS, Vendor, ask_vendor

__all__ = ["check_text"]

OWN_KINDS: tuple[Kind, ...] = ("encode", "encode with special tokens", "decode", "render")
EXAMPLES = 3
SHOWN = 60  # characters of each part of an example
SHOWN_IDS = 8


def check_text(bundle: Bundle) -> list[TextConformance]:
    """Replay the golden vectors of ``bundle``; one result for each implementation and kind of question.

    PocketLM's own tokenizer and template pass or fail, and so does a tokenizer.json that was rewritten for a vendor,
    read with PocketLM's code. A vendor's code on the files of its folder passes or differs: the bundle is right then,
    and the certificate counts what that vendor's runner gets wrong.
    Raises :class:`BundleError` for a golden file, tokenizer or template that is malformed or altered.
    """
    questions = read_questions(bundle)
    results = _check_own(bundle, questions)
    for vendor in VENDORS:
        if vendor.target in bundle.manifest.targets:
            results += _check_vendor_file(bundle, vendor, questions)
            results += _check_vendor(bundle, vendor, questions)
    return results


def _check_own(bundle: Bundle, questions: Sequence[Question]) -> list[TextConformance]:
    version = importlib.metadata.version("pocketlm")
    results = []
    for kind in _kinds(bundle, questions, OWN_KINDS):
        asked = [question for question in questions if question.kind == kind]
        answers = [_own_answer(bundle, question) for question in asked]
        results.append(_compare(f"pocketlm: {kind}", version, kind, asked, answers, otherwise="failed"))
    return results


def _own_answer(bundle: Bundle, question: Question) -> Answer:
    try:
        match question.asked:
            case str(text):
                special = question.kind == "encode with special tokens"
                return bundle.tokenizer.encode(text, add_special_tokens=special)
            case Chat() as chat if bundle.chat_template is not None:
                return bundle.chat_template.render(
                    chat.messages,
                    arguments=chat.template_arguments,
                    add_generation_prompt=chat.add_generation_prompt,
                    now=chat.now,
                )
            case Chat():
                return Refused("no chat template")
            case ids:
                return bundle.tokenizer.decode(ids)
    except PocketLMError as error:
        return Refused(str(error))


def _check_vendor_file(bundle: Bundle, vendor: Vendor, questions: Sequence[Question]) -> list[TextConformance]:
    name, files = f"{vendor.target}/tokenizer.json", bundle.manifest.files
    if name in files and files[name] == files.get("tokenizer/tokenizer.json"):
        return []  # the same bytes
    asked = [question for question in questions if question.kind == "encode"]
    if vendor.target == "executorch":
        # Replacements compose most text, but not all (vendor_tokenizers.py): what was composed before must be right.
        asked = [question for question in asked if unicodedata.is_normalized("NFC", str(question.asked))]
    answers: list[Answer]
    try:
        bundle.check_files(name)
        tokenizer = Tokenizer.open(bundle.folder / vendor.target)
        answers = [tokenizer.encode(str(question.asked), add_special_tokens=False) for question in asked]
    except PocketLMError as error:
        answers = [Refused(str(error))] * len(asked)
    version = importlib.metadata.version("pocketlm")
    return [_compare(f"pocketlm: encode with {name}", version, "encode", asked, answers, otherwise="failed")]


def _check_vendor(bundle: Bundle, vendor: Vendor, questions: Sequence[Question]) -> list[TextConformance]:
    kinds = _kinds(bundle, questions, vendor.kinds)
    if importlib.util.find_spec(vendor.module) is None:
        return [_not_run(f"{vendor.package}: {kind}", "none", kind, "not installed") for kind in kinds]
    version = importlib.metadata.version(vendor.package)
    bundle.check_files(f"{vendor.target}/")
    asked = [question for kind in kinds for question in questions if question.kind == kind]
    told = ask_vendor(vendor, bundle.folder / vendor.target, asked)
    results, start = [], 0
    for kind in kinds:
        of_kind = [question for question in asked if question.kind == kind]
        answers = told.answers[start : start + len(of_kind)]
        start += len(of_kind)
        name = f"{vendor.package}: {kind}"
        if told.trouble is not None and not answers:
            results.append(_not_run(name, version, kind, told.trouble))
            continue
        result = _compare(name, version, kind, of_kind, answers, otherwise="differs")
        if len(answers) < len(of_kind):
            result = result.model_copy(update={"status": "differs", "reason": told.trouble})
        results.append(result)
    return results


def _kinds(bundle: Bundle, questions: Sequence[Question], kinds: Sequence[Kind]) -> list[Kind]:
    """Those of ``kinds`` that this bundle has to answer: a base model has no template, and no chats."""
    has_chats = bundle.chat_template is not None or any(question.kind == "render" for question in questions)
    return [kind for kind in kinds if has_chats or GOLDEN_FILES[kind] != GOLDEN_FILES["render"]]


def _compare(
    name: str,
    version: str,
    kind: Kind,
    asked: Sequence[Question],
    answers: Sequence[Answer],
    otherwise: Literal["failed", "differs"],
) -> TextConformance:
    if not asked:
        return _not_run(name, version, kind, "the bundle holds no such golden vectors")
    pairs = zip(asked, answers, strict=False)  # a vendor that died gave fewer answers
    wrong = [(question, answer) for question, answer in pairs if answer != question.answer]
    return TextConformance(
        name=name,
        version=version,
        golden=GOLDEN_FILES[kind],
        status=otherwise if wrong else "passed",
        strings=len(answers),
        differing=len(wrong),
        examples=[_example(question, answer) for question, answer in wrong[:EXAMPLES]],
    )


def _not_run(name: str, version: str, kind: Kind, reason: str) -> TextConformance:
    return TextConformance(
        name=name, version=version, golden=GOLDEN_FILES[kind], status="not run", strings=0, differing=0, reason=reason
    )


def _example(question: Question, answer: Answer) -> str:
    asked = question.asked.messages if isinstance(question.asked, Chat) else question.asked
    wanted, got = _shown(question.answer, answer), _shown(answer, question.answer)
    return f"{_shortened(ascii(asked))}: {wanted} became {got}"


def _shown(answer: Answer, other: Answer) -> str:
    """``answer`` from shortly before the place where it leaves ``other``; ASCII, so that marks can be told apart."""
    if isinstance(answer, Refused):
        return _shortened(f"an error ({answer.words!a})")
    if isinstance(other, Refused):
        return _shortened(ascii(answer))
    same = next(
        (place for place, (one, two) in enumerate(zip(answer, other, strict=False)) if one != two),
        min(len(answer), len(other)),
    )
    length = SHOWN_IDS if isinstance(answer, list) else SHOWN
    start = max(0, same - length // 4)
    return f"{'...' if start else ''}{_shortened(ascii(answer[start : start + length]))}"


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
