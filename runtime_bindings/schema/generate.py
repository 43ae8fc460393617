"""Write the JSON schemas anew from the Python types: ``python runtime_bindings/schema/generate.py``."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pocketlm.certificate import Certificate
from pocketlm.manifest import Manifest
from pocketlm.replaying.recording import AnyLine
from pocketlm.results import AnyResult

FOLDER = Path(__file__).parent
SCHEMAS: dict[str, tuple[str, TypeAdapter[Any]]] = {
    "manifest": ("manifest.json of a PocketLM bundle, format 1", TypeAdapter(Manifest)),
    "certificate": ("certificate.json of a PocketLM bundle, format 1", TypeAdapter(Certificate)),
    "result": ("what pocketlm bench --json and pocketlm replay --json write, format 1", TypeAdapter(AnyResult)),
    "session": ("a line of what pocketlm run --record writes, format 1", TypeAdapter(AnyLine)),
}


def path(name: str) -> Path:
    """Where the schema of ``name`` lies."""
    return FOLDER / f"{name}.schema.json"


def _close(node: Any) -> None:
    """Refuse every other name where names have a pattern; pydantic refuses them, but its schema does not say so."""
    if isinstance(node, dict):
        if "patternProperties" in node:
            node["additionalProperties"] = False
        for value in node.values():
            _close(value)


def render(name: str) -> str:
    """The schema's text."""
    title, types = SCHEMAS[name]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **types.json_schema()}
    _close(schema)
    schema["title"] = title
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        path(name).write_text(render(name), encoding="utf-8")
