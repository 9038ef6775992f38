"""Where the ops of torch.ops.sorahpc are defined, and which body of each is live.

An op is defined in Python: schema, reference, fake, gradient. The reference is its default body, so that everything
works unbuilt; ``sorahpc/_ops.abi3.so``, where it is built, adds compiled bodies for CPU and CUDA. The only module that
imports ``sorahpc._C``.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from sorahpc.errors import SetupError

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).resolve().parent.parent / "_ops.abi3.so"

_definitions = torch.library.Library("sorahpc", "DEF")
_ops: dict[str, Any] = {}
_reference_wanted = 0


def _load() -> dict[str, str] | None:
    """Load the compiled ops. Schemas they were written for, by name; None where they are not built."""
    if not LIBRARY.is_file():
        log.warning(
            "sorahpc._ops is not built, the slower Python references serve; "
            "to have it: make build, or install again where there is a C++ compiler"
        )
        return None
    try:
        torch.ops.load_library(LIBRARY)
        schemas = ctypes.CDLL(str(LIBRARY)).sorahpc_schemas
    except (OSError, AttributeError) as error:
        raise SetupError(f"{LIBRARY}: can't be loaded ({error}); build it again for this torch: make build") from error
    schemas.restype = ctypes.c_char_p
    return {line.split("(")[0]: line for line in schemas().decode().splitlines()}


_compiled = _load()


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``torch.ops.sorahpc.<name>`` and return what calls it, or its reference inside `use_reference`.

    Args:
        schema: ``name(Tensor x, ...) -> Tensor``, the same text as in csrc/ops/ where the op has compiled bodies.
        reference: the default body, out of plain torch ops that autograd can follow. It returns new memory, never a
            view of an argument.
        fake: shape and dtype of the result, without data.
        setup_context, backward: the gradient, as of ``torch.library.register_autograd``. None for an op that is itself
            the gradient of another: it refuses to be differentiated, where torch would give a part of the answer.

    What it returns refuses forward-mode differentiation, for which torch would give zeros.

    Raises:
        SetupError: the compiled op was built for another schema; calling it would read garbage.
    """
    name = schema.split("(")[0]
    if _compiled is not None and _compiled.get(name, schema) != schema:
        raise SetupError(f"{LIBRARY}: built for `{_compiled[name]}`, this is `{schema}`; build it again: make build")
    _definitions.define(schema)
    _definitions.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sorahpc::{name}", fake, lib=_definitions)

    def refuse(*_: Any) -> None:
        raise NotImplementedError(f"{name} can't be differentiated; for second derivatives: ops.use_reference()")

    torch.library.register_autograd(
        f"sorahpc::{name}", backward or refuse, setup_context=setup_context, lib=_definitions
    )
    op = _ops[name] = getattr(torch.ops.sorahpc, name).default

    def call(*args: Any) -> Any:
        if _reference_wanted:
            return reference(*args)
        if forward_ad._current_level >= 0:
            raise NotImplementedError(f"{name} has no forward-mode derivative; ops.use_reference() has")
        return op(*args)

    return call


@contextmanager
def use_reference() -> Iterator[None]:
    """Every op runs its Python reference inside, forward and gradient: what tests and benchmarks compare with.

    It holds for the whole process, other threads included.
    """
    global _reference_wanted
    _reference_wanted += 1
    try:
        yield
    finally:
        _reference_wanted -= 1


def chosen(name: str) -> AbstractContextManager[None]:
    """`ops` of the configuration: "compiled" leaves to each op its best body, "reference" is `use_reference`."""
    return use_reference() if name == "reference" else nullcontext()


def native() -> Any:
    """The module ``sorahpc._C``, or None where it is not built."""
    try:
        import sorahpc._C as module
    except ModuleNotFoundError as error:
        if error.name != "sorahpc._C":
            raise
        return None
    return module


def build_info() -> dict[str, str] | None:
    """How the native parts were built (version, compiler, flags, torch, CUDA); None where ``sorahpc._C`` is not."""
    module = native()
    return None if module is None else dict(module.build_info())


def backend() -> dict[str, Any]:
    """What is live.

    Returns:
        ``library``: its path, or None; ``ops``: for each op, ``cpu`` and ``cuda`` are "compiled" or "reference";
        ``build``: `build_info`.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        "library": None if _compiled is None else str(LIBRARY),
        "ops": {
            name: {
                key.lower(): "compiled" if has_kernel(f"sorahpc::{name}", key) else "reference"
                for key in ("CPU", "CUDA")
            }
            for name in sorted(_ops)
        },
        "build": build_info(),
    }
