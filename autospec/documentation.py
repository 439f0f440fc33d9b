"""What is generated from the typed config: the JSON schema and the table of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autospec.config import Config, json_schema

SCHEMA = "workflow/schemas/config.schema.json"
TABLE = "docs/configuration.md"
HEAD = """\
# Settings

Generated from `autospec/config.py` by `python -m autospec schema`; do not edit. An analysis is described by one
`config.yaml`. Unknown settings, and values of the wrong type, are refused in one sentence.
"""


def generated() -> dict[str, str]:
    """Text of every generated file, by path."""
    return {SCHEMA: json.dumps(json_schema(), indent=2) + "\n", TABLE: settings_table()}


def write_generated(root: Path) -> list[str]:
    """Write the generated files below the repository's root and return their paths."""
    for path, text in generated().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return list(generated())


def settings_table() -> str:
    """Markdown page with one table for each class of settings."""
    schema = Config.model_json_schema()
    parts = [HEAD]
    for name, definition in [("The file", schema), *schema["$defs"].items()]:
        parts.append(f"\n## {name}\n\n{definition.get('description', '').splitlines()[0]}\n")
        parts.append("\n| setting | type | default | meaning |\n|---|---|---|---|\n")
        required = definition.get("required", [])
        for key, field in definition["properties"].items():
            default = (
                "required" if key in required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
            )
            if field.get("default") and isinstance(field["default"], dict):
                default = "as below"
            # A setting that is described in the words of its class has no description of its own.
            meaning = field.get("description") or schema["$defs"][_type(field)]["description"].splitlines()[0]
            parts.append(f"| `{key}` | {_type(field)} | {default} | {meaning} |\n")
    return "".join(parts)


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    for alternatives in ("anyOf", "oneOf"):
        if alternatives in field:
            return " or ".join(_type(option) for option in field[alternatives])
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    if field.get("type") == "object":
        value = field.get("additionalProperties") or next(iter(field["patternProperties"].values()))
        return f"{_type(value)} by name"
    return {"null": "nothing", "integer": "whole number", "string": "text", "boolean": "true or false"}.get(
        field["type"], field["type"]
    )
