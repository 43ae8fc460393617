"""The agent's archive for the architecture of this host: exactly the modules that a phone gets, on this Python."""

import shlex
import sys
from pathlib import Path

from pocketlm.devices.android.agent_archive import SCRIPT, AgentArchive, agent_modules, pack

# -I: neither the current folder nor PYTHONPATH. The first pocketlm on the path is the archive's, and none completes it.
START = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('pocketlm.agent', None, '__main__', True)"
)


def host_archive(folder: Path, before: str = "") -> AgentArchive:
    """``before``: what its script does first, in the device's sh, in the folder of the job."""
    command = f'exec {shlex.quote(sys.executable)} -I -c {shlex.quote(START)} "${{0%/*}}/packages" "$@"'
    modules = {f"packages/{name}": path for name, path in agent_modules().items()}
    return pack({SCRIPT: f"{before}\n{command}\n".encode(), **modules}, folder)
