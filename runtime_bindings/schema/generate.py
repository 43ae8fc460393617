"""Write the JSON schemas anew from the Python types: ``python runtime_bindings/schema/generate.py``."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pocketlm.certificate import Certificate
from pocketlm.manifest import FORMAT_MAJOR, Manifest

FOLDER = Path(__file__).parent
SCHEMAS: dict[str, type[BaseModel]] = {"manifest": Manifest, "certificate": Certificate}


def path(name: str) -> Path:
    """Where the schema of ``name``.json lies."""
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
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMAS[name].model_json_schema()}
    _close(schema)
    schema["title"] = f"{name}.json of a PocketLM bundle, format {FORMAT_MAJOR}"
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        path(name).write_text(render(name), encoding="utf-8")
