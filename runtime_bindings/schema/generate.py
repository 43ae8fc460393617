"""Write manifest.schema.json anew from the Python types: ``python runtime_bindings/schema/generate.py``."""

import json
from pathlib import Path
from typing import Any

from pocketlm.manifest import FORMAT_MAJOR, Manifest

SCHEMA = Path(__file__).with_name("manifest.schema.json")


def _close(node: Any) -> None:
    """Refuse every other name where names have a pattern; pydantic refuses them, but its schema does not say so."""
    if isinstance(node, dict):
        if "patternProperties" in node:
            node["additionalProperties"] = False
        for value in node.values():
            _close(value)


def render() -> str:
    """The schema's text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    _close(schema)
    schema["title"] = f"manifest.json of a PocketLM bundle, format {FORMAT_MAJOR}"
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(render(), encoding="utf-8")
