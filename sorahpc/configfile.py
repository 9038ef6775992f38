"""A config's file: YAML and ``dotted.key=value`` overrides in, a checked `Config` or one line a fault out.

There is no inheritance between files but one level: ``cluster:`` and ``model:`` may name a file in ``configs/cluster``
or ``configs/model``.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sorahpc.config import Config, shipped_dir
from sorahpc.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20
NAMED = ("cluster", "model")  # sections that may name a file


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (a few lines of them can expand to gigabytes) and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"line {self.peek_event().start_mark.line + 1}: aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: keys are words, not {key!r}")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: `{key}` is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-4 as a string; people who train models write nothing else.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}:{line} not valid YAML: {problem}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: {size} bytes; a config has at most {MAX_CONFIG_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: can't read the config: {reason}") from None
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of sections expected, found {type(data).__name__}")
    return data


def _named(kind: str, value: Any, base: Path) -> Any:
    """`cluster: slurm` or `model: ./my.yaml` -> the mapping of that file; mappings pass through."""
    if not isinstance(value, str):
        return value
    folder = shipped_dir() / kind
    path = Path(value)
    candidates = [path, base / path] if path.suffix in (".yaml", ".yml") else [folder / f"{value}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return _read_yaml(candidate)
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    expected = f"a .yaml path or one of {', '.join(names)}{_near(value, names)}"
    raise ConfigError(f"{kind}: no file for {value!r}; expected {expected}")


def _near(word: str, words: list[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _override(data: dict[str, Any], text: str) -> None:
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"{text!r}: an override is dotted.key=value")
    node = data
    for i, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(parts[: i + 1])}: is a value, not a section, so {key} can't be set")
    node[parts[-1]] = _parse(value, key)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = (), cluster: str | None = None) -> Config:
    """Read, override and check a config.

    Args:
        path: YAML file, or the name of a shipped one (``demo``).
        overrides: ``dotted.key=value`` texts; values are YAML. ``cluster=`` and ``model=`` are applied first.
        cluster: replaces the section ``cluster``: a shipped name (``local``, ``slurm``) or a YAML file.

    Raises:
        ConfigError: one line a fault, each with its dotted key.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        shipped = shipped_dir() / f"{path}.yaml"
        names = sorted(p.stem for p in shipped_dir().glob("*.yaml"))
        if not shipped.is_file():
            expected = f"a .yaml file or one of {', '.join(names)}{_near(str(path), names)}"
            raise ConfigError(f"{path}: no such config; expected {expected}")
        path = shipped
    data = _read_yaml(path)
    if cluster is not None:
        data["cluster"] = cluster
    whole = [text for text in overrides if text.partition("=")[0].strip() in NAMED]
    for text in whole:
        _override(data, text)
    for name in NAMED:  # before the dotted overrides, which reach into the named files
        if name in data:
            data[name] = _named(name, data[name], path.parent)
    for text in overrides:
        if text not in whole:
            _override(data, text)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> Config:
    """Check plain data. Raises ConfigError with one line a fault."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        inside = {fault["loc"][:n] for fault in faults for n in range(len(fault["loc"]))}
        # pydantic counts no item that is wrong itself, and calls its list too short as well.
        faults = [f for f in faults if f["type"] != "too_short" or f["loc"] not in inside]
        raise ConfigError("\n".join(map(_fault_line, faults))) from None


_TYPE_WORDS = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section (a mapping)",
    "model_attributes_type": "a section (a mapping)",
}


def _fault_line(error: Any) -> str:
    parts = [str(p) for p in error["loc"]]
    key, kind, found = ".".join(parts), error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_near(parts[-1], _fields_at(parts[:-1]))}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    if kind == "value_error":
        expected = str(error["ctx"]["error"])
        first, colon, rest = expected.partition(": ")
        if colon and re.fullmatch(r"[a-z_.0-9]+", first):  # a cross-field rule names the field to change
            return f"{'.'.join([*parts, first])}: expected {rest}"
    elif kind in ("too_short", "too_long"):
        number = error["ctx"]["min_length" if kind == "too_short" else "max_length"]
        expected = f"at {'least' if kind == 'too_short' else 'most'} {number} item{'s' if number > 1 else ''}"
    else:
        expected = _TYPE_WORDS.get(kind) or error["msg"].removeprefix("Input should be ")
    shown = json.dumps(found, default=str)
    return f"{key}: expected {expected}, found {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _fields_at(parts: list[str]) -> list[str]:
    node: Any = Config
    for part in parts:
        field = node.model_fields.get(part) if isinstance(node, type) and issubclass(node, BaseModel) else None
        if field is None:
            return []
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        node = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return list(node.model_fields) if node else []


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` of it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors."""
    return Config.model_json_schema()
