"""``pocketlm inspect``: what is inside a bundle, or what a checkpoint would become."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketlm.cli.console import Debug, Json, print_json, reported

__all__ = ["EXAMPLE", "inspect"]

EXAMPLE = "Example: pocketlm inspect smollm2.pocketlm --context 1024"


def inspect(
    path: Annotated[str, typer.Argument(metavar="BUNDLE|CHECKPOINT", help="A bundle, a checkpoint or org/name.")],
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Positions for the memory; default: as exported.")
    ] = None,
    accept: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Of a checkpoint: a key or tensor to ignore; repeatable.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a bundle, its files checked, or what can be said of a checkpoint before any work.

    Exit code 1 if a checkpoint is sound but not supported.
    """
    with reported(debug):
        if (Path(path) / "manifest.json").exists():
            _inspect_bundle(path, context, json)
        else:
            _inspect_checkpoint(path, context, accept or [], json)


def _inspect_bundle(path: str, context: int | None, json: bool) -> None:
    from pocketlm.bundle import open_bundle
    from pocketlm.cli.description import describe_bundle, print_bundle
    from pocketlm.errors import ContextLengthError

    bundle = open_bundle(path)
    bundle.check_files()
    longest = bundle.manifest.model.context_length
    if context is not None and not 1 <= context <= longest:
        raise ContextLengthError(f"--context must be between 1 and the exported {longest}, not {context}")
    description = describe_bundle(bundle, context)
    if json:
        print_json(description)
    else:
        print_bundle(description, bundle.certificate)


def _inspect_checkpoint(path: str, context: int | None, accept: list[str], json: bool) -> None:
    from pocketlm.errors import UnsupportedError

    try:
        description = _describe_checkpoint(path, context, accept)
    except UnsupportedError as error:
        description = {"kind": "checkpoint", "path": path, "supported": False, "reason": str(error)}
    if json:
        print_json(description)
    else:
        _print_checkpoint(description)
    if not description["supported"]:
        raise typer.Exit(1)


def _describe_checkpoint(path: str, context: int | None, accept: list[str]) -> dict[str, Any]:
    from pocketlm.cli.description import KV_BYTES
    from pocketlm_export.inspection import inspect_checkpoint

    report = inspect_checkpoint(path, context_length=context, accept=accept)
    config = report.config
    return {
        "kind": "checkpoint",
        "path": path,
        "supported": None in report.targets.values(),
        "left_out": report.left_out,
        "model": {
            "model_type": config.model_type,
            "vocabulary_size": config.vocabulary_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "layers": len(config.layers),
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "context_length": config.context_length,
            "windows": sorted({layer.window for layer in config.layers if layer.window is not None}),
            "tied": config.tied,
            "stop_ids": list(report.stop_ids),
        },
        "parameters": report.parameters,
        "stored_as": dict(report.dtypes),
        "weight_bytes": dict(report.weight_bytes),
        "targets": {
            name: {
                "supported": report.targets[name] is None,
                "reason": report.targets[name],
                "kv_cache_bytes": report.kv_values * size,
            }
            for name, size in KV_BYTES.items()
        },
        "memory_context": report.context_length,
        "chat_template": report.has_chat_template,
    }


def _print_checkpoint(description: Mapping[str, Any]) -> None:
    from pocketlm.cli.description import print_table, readable

    if "reason" in description:
        print_table((("checkpoint", description["path"]), ("not supported", description["reason"])))
        return
    model = description["model"]
    windows = f", windows of {', '.join(map(str, model['windows']))}" if model["windows"] else ""
    print_table(
        (
            ("checkpoint", description["path"]),
            ("model", f"{model['model_type']}, {description['parameters']:,} parameters, {model['layers']} layers"),
            *((("exported", description["left_out"]),) if description["left_out"] else ()),
            ("context", f"{model['context_length']:,} positions{windows}"),
            ("stored as", ", ".join(f"{count:,} {dtype}" for dtype, count in description["stored_as"].items())),
            *((f"as {name}", f"{readable(size)} of weights") for name, size in description["weight_bytes"].items()),
            ("chat template", "yes" if description["chat_template"] else "no"),
            *(
                (
                    name,
                    f"{'supported' if target['supported'] else 'not supported: ' + target['reason']}; cache of "
                    f"{description['memory_context']:,} positions {readable(target['kv_cache_bytes'])}",
                )
                for name, target in description["targets"].items()
            ),
        )
    )
