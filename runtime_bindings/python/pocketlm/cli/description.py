"""A bundle in numbers, for ``inspect`` and at the end of ``export``."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pocketlm.bundle import Bundle
from pocketlm.certificate import Certificate
from pocketlm.cli.certificate import certificate_lines, verdict

__all__ = ["KV_BYTES", "describe_bundle", "print_bundle", "print_table", "readable"]

# Bytes of a cached key or value in each target's runtime.
KV_BYTES: Mapping[str, int] = {"onnx": 4, "executorch": 4, "coreml": 2}


def describe_bundle(bundle: Bundle, context_length: int | None = None) -> dict[str, Any]:
    """JSON's types; ``memory`` is of a session at ``context_length`` positions, by default the exported ones."""
    manifest = bundle.manifest
    model = manifest.model
    context = context_length or model.context_length
    kv_values = 2 * model.layers * model.kv_heads * model.head_dim * context
    sizes = {
        name: sum(record.size for path, record in manifest.files.items() if path.startswith(f"{name}/"))
        for name in manifest.targets
    }
    installed = set(bundle.runtimes())
    certificate = bundle.certificate
    return {
        "kind": "bundle",
        "path": str(bundle.folder),
        "format_version": manifest.format_version,
        "model": model.model_dump(mode="json", exclude_none=True),
        "scheme": manifest.scheme.model_dump(mode="json"),
        "parameters": sum(math.prod(weight.shape) for weight in manifest.weights.values()),
        "bytes": sum(record.size for record in manifest.files.values()),
        "targets": {
            name: {
                **target.model_dump(mode="json"),
                "bytes": sizes[name],
                "kv_cache_bytes": kv_values * KV_BYTES[name],
                "installed": name in installed,
            }
            for name, target in manifest.targets.items()
        },
        "memory_context": context,
        "chat_template": bundle.chat_template is not None,
        "certificate": certificate.model_dump(mode="json") if certificate is not None else None,
        "provenance": manifest.provenance.model_dump(mode="json"),
    }


def print_bundle(description: Mapping[str, Any], certificate: Certificate | None) -> None:
    """The same for people, the certificate as a table behind it."""
    model, scheme = description["model"], description["scheme"]
    classes = ", ".join(f"{name} {scheme[name]}" for name in ("linears", "embedding", "head"))
    if scheme["group"] is not None:
        classes += f"; groups of {scheme['group']} columns"
    rows = [
        ("bundle", f"{description['path']}, {readable(description['bytes'])}, format {description['format_version']}"),
        ("model", f"{model['model_type']}, {description['parameters']:,} parameters, {model['layers']} layers"),
        ("context", f"{model['context_length']:,} positions of the model's {model['trained_context_length']:,}"),
        ("scheme", f"{scheme['name']}: {classes}; {scheme['bits_per_weight']:.2f} bits per weight"),
        ("chat template", "yes" if description["chat_template"] else "no"),
        ("certificate", "none" if certificate is None else verdict(certificate)),
    ]
    for name, target in description["targets"].items():
        runtime = ", ".join(f"{package} {versions}" for package, versions in target["runtime"].items())
        rows += [
            (name, f"{target['path']}, {readable(target['bytes'])}"),
            ("", f"runs on {runtime}" + ("" if target["installed"] else ", which is not installed here")),
            ("", f"cache of {description['memory_context']:,} positions: {readable(target['kv_cache_bytes'])}"),
            *(("", text) for text in target["notes"]),
        ]
    print_table(rows)
    if certificate is not None:
        print()
        for line in certificate_lines(certificate):
            print(line)


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    for name, value in rows:
        print(f"{name:<14} {value}")


def readable(size: int) -> str:
    """Bytes in the unit that people read: ``3.4 MB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
