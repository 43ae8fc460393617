"""``pocketlm verify``: open the written files again and issue the certificate."""

from pathlib import Path
from typing import Annotated

import typer

from pocketlm.cli.console import Adapter, Debug, Json, Oracle, print_json, reported

__all__ = ["EXAMPLE", "verify"]

EXAMPLE = "Example: pocketlm verify smollm2.pocketlm --reference smollm2 --oracle transformers"


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle to verify.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="The checkpoint that it was made from, for loss and oracle."),
    ] = None,
    adapter: Adapter = None,
    oracle: Oracle = None,
    targets: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Targets, by commas; default: all of the bundle.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The weight store; default: $XDG_CACHE_HOME/pocketlm.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Open the written files of a bundle again and issue its certificate. Exit code 1 if a level failed."""
    with reported(debug):
        from pocketlm.cli.certificate import certificate_lines, verdict
        from pocketlm.cli.progress import export_progress
        from pocketlm_export.verify import verify_bundle

        chosen = None if targets is None else tuple(name.strip() for name in targets.split(","))
        with export_progress() as progress:
            certificate = verify_bundle(
                bundle,
                reference=reference,
                adapter=adapter,
                oracle=oracle,
                targets=chosen,
                store=store,
                progress=progress,
            )
        if json:
            print_json({**certificate.model_dump(mode="json"), "passed": certificate.passed})
        else:
            for line in certificate_lines(certificate):
                print(line)
            print(verdict(certificate))
    if not certificate.passed:
        raise typer.Exit(1)
