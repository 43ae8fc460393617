"""What an artifact is held against: the certificate of a written bundle."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.bundle import Bundle, open_bundle
from pocketlm.certificate import CERTIFICATE_FILE, Certificate

if TYPE_CHECKING:
    from pocketlm_export.pipeline import Progress

__all__ = ["verify_bundle", "write_certificate"]


def verify_bundle(
    bundle: Bundle | str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    oracle: str | None = None,
    targets: Iterable[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: "Progress | None" = None,
) -> Certificate:
    """Open the written files of ``bundle`` again, issue its certificate, and write it to certificate.json.

    ``reference``: the checkpoint that the bundle was made from, a folder or ``org/name[@revision]``; without it there
    is no loss and no oracle. ``adapter``: the folder of the adapter that was merged into it. ``oracle``:
    ``transformers``, or None. A level that fails is in the certificate; see :attr:`Certificate.passed`. Raises
    :class:`pocketlm.InputError` for a bundle or reference that can't be used.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    opened.check_files()

    # These import torch, so only once the bundle is known to be good.
    from pocketlm_export.pipeline import Progress
    from pocketlm_export.quantization.store import WeightStore, default_store
    from pocketlm_export.verify.subject import open_subject
    from pocketlm_export.verify.verification import issue_certificate

    told = progress or Progress()
    told.stage("verify the files", 0)
    subject = open_subject(
        opened,
        None if reference is None else os.fspath(reference),
        None if adapter is None else Path(adapter),
        WeightStore(default_store() if store is None else Path(store)),
        told.advance,
    )
    certificate = issue_certificate(
        subject, targets=None if targets is None else tuple(targets), oracle=oracle, stage=told.stage
    )
    write_certificate(opened.folder, certificate)
    opened.certificate = certificate
    return certificate


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Replace certificate.json in one step."""
    path = folder / CERTIFICATE_FILE
    temporary = path.with_name(f".{CERTIFICATE_FILE}.{os.getpid()}")
    try:
        temporary.write_text(certificate.to_json(), encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
