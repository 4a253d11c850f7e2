"""The recipe reference (docs/recipe.md), rendered from the JSON Schema."""

from __future__ import annotations

import json
from typing import Any

_INTRO = """\
# Recipe reference

Made by `compress schema --docs`; `compress schema` prints the JSON Schema (also in
`schema/recipe.schema.json`), by which editors complete recipes.
"""


def render(schema: dict[str, Any]) -> str:
    """Markdown with one table per section of the recipe."""
    parts = [_INTRO, _section("Recipe", schema)]
    for name, section in schema["$defs"].items():
        if section.get("type") == "object":
            parts.append(_section(name, section))
    return "\n".join(parts)


def _section(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    lines = [f"## {name}", ""]
    about = schema.get("description", "").split("\n\n")[0].replace("\n", " ")
    if about:
        lines += [about, ""]
    lines += ["| key | value | default | what it is |", "|---|---|---|---|"]
    for key, value in schema.get("properties", {}).items():
        default = "required" if key in required else _default(value)
        text = value.get("description", "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{key}` | {_type(value)} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if default is None or default == "":
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return " \\| ".join(f"`{v}`" for v in value["enum"])
    if "anyOf" in value:
        return " \\| ".join(_type(v) for v in value["anyOf"] if v.get("type") != "null")
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    if value.get("type") == "object":
        named: list[dict[str, Any]] = list(value.get("patternProperties", {}).values())
        inner = value.get("additionalProperties") or (named[0] if named else {})
        return f"mapping of name to {_type(inner)}"
    return str(value.get("type", "any"))
