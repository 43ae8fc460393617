"""What a binding of ExecuTorch does with damaged programs; each in a process of its own, for some end it.

    python -m tests.bundle.damaged_programs native|torch BUNDLE FOLDER

prints a line for each ``*.pte`` of FOLDER: its name, and ``ran``, ``refused`` or ``ended`` with the signal.
"""

import importlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pocketlm
from pocketlm.artifact import Artifact
from pocketlm.errors import PocketLMError

SECONDS = 20


def outcome(module: ModuleType, artifact: Artifact) -> str:
    """In a child of this process, which has imported everything."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 1
        try:
            with module.open_session(artifact, 1) as session:
                session.extend([5, 6, 7])
            code = 0
        except PocketLMError:
            code = 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended {os.WTERMSIG(status)}"
    return {0: "ran", 2: "refused"}.get(os.waitstatus_to_exitcode(status), "broke")


if __name__ == "__main__":
    binding, bundle, folder = sys.argv[1:]
    module = importlib.import_module(f"pocketlm.runtimes.executorch_{binding}")
    artifact = pocketlm.open(bundle).artifact("executorch")
    module.runtime_build()  # loads the libraries
    for program in sorted(Path(folder).glob("*.pte")):
        print(program.name, outcome(module, replace(artifact, path=program)), flush=True)
