"""One export in a process of its own: ``python -m pocketlm_bench.export_process JOB``, started by ``measured_export``.

JOB is a JSON object of ``checkpoint``, ``output`` and ``options``, those of :class:`pocketlm_export.ExportOptions`. The
last line on stdout is a JSON object: what was exported and when each stage began, or ``error`` and ``exit_code``.
Imports are timed apart, because they can cost more than the work; nothing is imported here before that clock runs.
"""

import builtins
import json
import sys
import threading
import time
from typing import Any


class ImportClock:
    """``seconds`` that import statements of the main thread have taken since it was started."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._import = builtins.__import__
        self._importing = False

    def start(self) -> None:
        """Stand in the place of the function behind every import statement."""
        builtins.__import__ = self._timed

    def _timed(self, *arguments: Any, **keywords: Any) -> Any:
        if self._importing or threading.current_thread() is not threading.main_thread():
            return self._import(*arguments, **keywords)
        self._importing = True
        begin = time.monotonic()
        try:
            return self._import(*arguments, **keywords)
        finally:
            self._importing = False
            self.seconds += time.monotonic() - begin


def _export(job: dict[str, Any], clock: ImportClock) -> dict[str, Any]:
    stages: list[dict[str, Any]] = []

    def begin(name: str, _elements: int) -> None:
        now = {"begun": time.monotonic(), "cpu_seconds": time.process_time(), "import_seconds": clock.seconds}
        stages.append({"name": name, **now})

    import math
    from pathlib import Path

    from pocketlm_export.options import ExportOptions
    from pocketlm_export.pipeline import Progress, export_bundle

    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in job["options"].items()
    }
    options["store"] = Path(options["store"])
    bundle = export_bundle(job["checkpoint"], Path(job["output"]), ExportOptions(**options), Progress(stage=begin))
    begin("exit", 0)
    files = {name: record.size for name, record in bundle.manifest.files.items()}
    return {
        "stages": stages,
        "parameters": sum(math.prod(weight.shape) for weight in bundle.manifest.weights.values()),
        "bundle_bytes": sum(files.values()),
        "artifacts": {
            target: {name: size for name, size in files.items() if name.startswith(f"{target}/")}
            for target in bundle.manifest.targets
        },
    }


def main() -> None:
    """Export what the command line says; exit code 1 with an error that was foreseen."""
    clock = ImportClock()
    clock.start()
    from pocketlm.errors import PocketLMError

    try:
        result = _export(json.loads(sys.argv[1]), clock)
    except PocketLMError as error:
        result = {"error": str(error), "exit_code": error.exit_code}
    print(json.dumps(result))
    sys.exit(1 if "error" in result else 0)


if __name__ == "__main__":
    main()
