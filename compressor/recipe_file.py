"""A recipe's file: YAML of plain values, and errors that name its lines."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from compressor.errors import RecipeError

MAX_RECIPE_BYTES = 1 << 18
MAX_DEPTH = 20
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null")}
_INIT = "`compress init MODEL` writes a recipe to start from"


def compose(path: Path) -> yaml.Node:
    """The YAML nodes of a file, with their lines.

    Raises:
        RecipeError: it cannot be read, or is not YAML.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
        if len(data) > MAX_RECIPE_BYTES:
            raise RecipeError(
                f"the file is too large for a recipe (over {MAX_RECIPE_BYTES >> 10} KiB)",
                where=str(path),
                fix="give the path of a recipe, not of a model or a data set",
            )
        text = data.decode("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _yaml_files(path.parent), 1)
        hint = f"did you mean {path.with_name(near[0])}?" if near else _INIT
        raise RecipeError("there is no such recipe", where=str(path), fix=hint) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"the file is not UTF-8 (byte {error.start})",
            where=f"{path}:{line}",
            fix="save it as UTF-8",
        ) from None
    except (OSError, ValueError) as error:
        detail = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"cannot be read ({detail})", where=str(path), fix="give a recipe file"
        ) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            f"not valid YAML: {error.problem or error.context}",
            where=f"{path}:{mark.line + 1 if mark else 1}",
            fix="check indentation (spaces, not tabs), colons and quotes around this line",
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"not valid YAML: control character U+{error.character:04X}",
            where=f"{path}:{line}",
            fix="remove that character",
        ) from None
    except RecursionError:
        raise RecipeError("not valid YAML: nested too deeply", where=str(path), fix=_INIT) from None
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=str(path), fix=_INIT) from None
    if node is None:
        raise RecipeError("the file is empty", where=f"{path}:1", fix=_INIT)
    return node


def _yaml_files(directory: Path) -> list[str]:
    return [p.name for p in directory.glob("*.y*ml")] if directory.is_dir() else []


def plain_value(root: yaml.Node, path: Path) -> Any:
    """The node's value, built by the safe loader from text, numbers, lists and mappings alone."""
    seen: set[int] = set()
    loader = yaml.SafeLoader("")

    def refuse(item: yaml.Node, what: str, fix: str) -> RecipeError:
        return RecipeError(what, where=f"{path}:{item.start_mark.line + 1}", fix=fix)

    def build(item: yaml.Node, depth: int) -> Any:
        if id(item) in seen:
            raise refuse(item, "YAML aliases (*) are not used in recipes", "write it out")
        seen.add(id(item))
        if depth > MAX_DEPTH:
            raise refuse(item, "nested too deeply", "no recipe needs this")
        if isinstance(item, yaml.MappingNode) and item.tag == f"{_TAG}map":
            return mapping(item, depth)
        if isinstance(item, yaml.SequenceNode) and item.tag == f"{_TAG}seq":
            return [build(value, depth + 1) for value in item.value]
        if isinstance(item, yaml.ScalarNode) and item.tag in _SCALAR_TAGS:
            return scalar(item)
        tag = item.tag.replace(_TAG, "!!")
        raise refuse(item, f"not a plain value: {tag}", "quote it if it is meant as text")

    def scalar(item: yaml.ScalarNode) -> Any:
        try:
            item.value.encode("utf-8")  # a lone surrogate could not be written to any file
            if "\0" in item.value:
                raise ValueError("no path may hold a NUL")
            return loader.construct_object(item)
        except (yaml.YAMLError, ValueError, LookupError, OverflowError):
            kind = item.tag.removeprefix(_TAG)
            raise refuse(
                item, f"not a plain value: cannot be read as {kind}", "quote it if it is text"
            ) from None

    def mapping(item: yaml.MappingNode, depth: int) -> dict[str, Any]:
        value: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, inner in item.value:
            if not isinstance(key, yaml.ScalarNode):
                raise refuse(key, "a key must be plain text", "use a single word")
            name = scalar(key) if key.tag == f"{_TAG}str" else None
            if not isinstance(name, str):
                what = f"key {key.value!r} is not text in YAML"
                raise refuse(key, what, f'put it in quotes: "{key.value}"')
            if name in lines:
                what = f"key {name!r} is there twice (first on line {lines[name]})"
                raise refuse(key, what, "remove one of the two")
            lines[name] = key.start_mark.line + 1
            value[name] = build(inner, depth + 1)
        return value

    return build(root, 0)


_EXPECTED = {
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "list_type": "a list",
    "string_type": "text (put it in quotes)",
}


def explain(
    error: ValidationError, root: yaml.Node, path: Path, model: type[BaseModel]
) -> RecipeError:
    """One error that lists every problem, each with its line, in the file's order."""
    found = []
    for problem in error.errors():
        loc = problem.get("ctx", {}).get("loc", problem["loc"])
        key = ".".join(str(part) for part in loc if part != "[key]") or "recipe"
        if problem["type"] == "extra_forbidden":
            valid = _valid_keys(model, loc[:-1])
            near = difflib.get_close_matches(str(loc[-1]), valid, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            text = f"unknown key {loc[-1]!r}; {hint}"
        elif problem["type"] == "missing":
            text = f"{key} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] in _EXPECTED:
                message = f"input should be {_EXPECTED[problem['type']]}"
            given = problem["input"]
            shown = f" (got {given!r})" if isinstance(given, str | int | float) else ""
            text = f"{key}: {message[:1].lower() + message[1:]}{shown}"
        found.append((line_of(root, loc), text))
    found.sort()
    (line, first), *others = found
    rest = "".join(f"\n{path}:{other}: {text}" for other, text in others)
    return RecipeError(
        first + rest, where=f"{path}:{line}", fix="every key is described in docs/recipe.md"
    )


def line_of(root: yaml.Node, loc: tuple[int | str, ...]) -> int:
    """Line (from 1) of the node at a location, or of its nearest parent that exists."""
    node, line = root, root.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    node, line = value, key.start_mark.line + 1
                    break
            else:
                break
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _valid_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Keys that may stand at a location."""
    current: Any = model
    for part in loc:
        if _is_model(current) and part in current.model_fields:
            current = current.model_fields[part].annotation
        else:  # an index of a list, or a key of a mapping such as `variants`
            current = next(models_in(current), current)
        if not _is_model(current) and get_origin(current) not in (dict, list):
            current = next(models_in(current), current)
    if not _is_model(current):
        return []
    return [field.alias or name for name, field in current.model_fields.items()]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Pydantic models inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from models_in(argument)
