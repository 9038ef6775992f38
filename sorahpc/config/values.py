"""What a value of a config may be, and what several sections ask for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sorahpc.errors import ConfigError

# A value that may reach a shell script, a scheduler option or a file name. No control characters, quotes, spaces or
# shell syntax: what can't be written can't be injected.
SAFE_VALUE = re.compile(r"[A-Za-z0-9._:=,@%+/\[\]-]+")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MIN_FPS, MAX_FPS = 0.001, 240  # of clips, in a cache too; an mp4 can have any of these


def shipped_dir() -> Path:
    """Folder ``configs/`` of the checkout, or the copy that an installed package carries."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "model").is_dir():
            return folder
    raise ConfigError(f"configs: no folder of shipped configs beside {package}; reinstall sorahpc")


def _check_path(path: Path) -> Path:
    text = str(path)
    if not text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError("a path without control characters")
    # What we ship is found from any working directory, also where only the package is installed.
    if not path.is_absolute() and path.parts[:1] == ("configs",) and not path.exists():
        inside = shipped_dir().joinpath(*path.parts[1:])
        if inside.exists():
            return inside
    return path


def _check_safe(text: str) -> str:
    if not SAFE_VALUE.fullmatch(text) or text.startswith("-"):
        raise ValueError("letters, digits and any of ._:=,@%+/[]- (it goes into a script)")
    return text


def _check_variable(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("the name of an environment variable: letters, digits and _, not starting with a digit")
    return text


def _check_name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError("1 to 64 letters, digits, dots, dashes or underscores, starting with a letter or digit")
    return text


ConfigPath = Annotated[Path, AfterValidator(_check_path)]
VariableName = Annotated[str, AfterValidator(_check_variable)]
SafeStr = Annotated[str, AfterValidator(_check_safe)]
RunName = Annotated[str, AfterValidator(_check_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ArrayResources(Section):
    """What an array of independent tasks asks for, a task."""

    tasks: int = Field(1, ge=1, le=10_000, description="independent tasks; the result does not depend on it")
    cpus_per_task: int = Field(1, ge=1)
    mem_gb: float | None = Field(None, gt=0, description="memory a task; None: the partition's default")
    time_min: int = Field(60, ge=1, description="time limit")


class GangResources(Section):
    """What a job of ranks that work together asks for. World size = nodes x tasks_per_node."""

    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1, description="ranks a node; on CUDA one a GPU")
    cpus_per_task: int = Field(1, ge=1)
    mem_gb: float | None = Field(None, gt=0, description="memory a node; None: the partition's default")
    time_min: int = Field(60, ge=1, description="time limit")

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node
