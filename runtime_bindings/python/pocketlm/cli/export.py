"""``pocketlm export``: the main job."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketlm.cli.console import Adapter, Debug, Json, Oracle, print_json, reported

__all__ = ["EXAMPLE", "export"]

EXAMPLE = "Example: pocketlm export ./SmolLM2-135M-Instruct -o smollm2.pocketlm --targets onnx,coreml --context 2048"


def export(
    checkpoint: Annotated[str, typer.Argument(help="A folder, or org/name[@revision] on the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write.")],
    targets: Annotated[
        str | None, typer.Option(metavar="LIST", help="onnx, executorch, coreml, separated by commas; default: all.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(metavar="NAME", help="int4 (default), int8 or fp32.")] = None,
    head: Annotated[
        str | None, typer.Option(metavar="NAME", help="Embedding and head: int8 (default) or int4.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Columns that share a scale in int4: 32 (default), 64 or 128.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="N", help="Positions; default: the smaller of the model's and 4096.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML recipe of these options; the command line wins.")
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A configuration key, tensor or token to ignore; repeatable."),
    ] = None,
    adapter: Adapter = None,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The weight store; default: $XDG_CACHE_HOME/pocketlm.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at --output.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="End without a certificate.")] = False,
    oracle: Oracle = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a checkpoint to a bundle."""
    with reported(debug):
        from pocketlm.cli.certificate import verdict
        from pocketlm.cli.description import describe_bundle, print_bundle
        from pocketlm.cli.progress import export_progress
        from pocketlm_export.options import ExportOptions, read_recipe
        from pocketlm_export.pipeline import export_bundle

        options: dict[str, Any] = read_recipe(config) if config is not None else {}
        given = {
            "targets": tuple(name.strip() for name in targets.split(",")) if targets is not None else None,
            "scheme": scheme,
            "head": head,
            "group": group_size,
            "context": context,
            "accept": tuple(accept) if accept else None,
            "adapter": adapter,
            "store": store,
            "force": force or None,
            "verify": False if no_verify else None,
            "oracle": oracle,
        }
        options |= {name: value for name, value in given.items() if value is not None}
        started = time.perf_counter()
        with export_progress() as progress:
            bundle = export_bundle(checkpoint, output, ExportOptions(**options), progress)
        seconds = round(time.perf_counter() - started, 2)
        description = describe_bundle(bundle)
        if json:
            print_json({**description, "seconds": seconds})
        else:
            print_bundle(description, bundle.certificate)
            ending = "not verified: --no-verify" if bundle.certificate is None else verdict(bundle.certificate)
            print(f"exported in {seconds:.1f} s; {ending}")
