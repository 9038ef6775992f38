"""The peers of `rope_case`: none of the libraries is here, so stand-ins hold to what each one's source says.

They assert the layouts and dtypes that the real kernels check or silently assume, round where those round, and write
where those write. That the real ones are called rightly is proven where they are installed, by `timing.check`.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sorahpc.ops.rope import rope3d
from sorahpc.profiling import cases, peers
from sorahpc.profiling.cases import AXES, THETA, Case, rope_case
from sorahpc.profiling.peers import rope_peers, to_halves, to_pairs
from sorahpc.profiling.results import OURS
from sorahpc.profiling.timing import check

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PACKAGES = ("transformer_engine", "apex", "fused_rotary_positional_embedding", "liger_kernel", "flash_attn")
NAMES = ["Transformer Engine", "apex", "Liger", "flash-attn"]
DTYPES = (torch.float32, torch.bfloat16)


def quarter_turned(x: Tensor, interleaved: bool) -> Tensor:
    """Element by element, as the kernels index: of a pair (a, b), (-b, a)."""
    dim = x.shape[-1]
    i = torch.arange(dim)
    first = i % 2 == 0 if interleaved else i < dim // 2
    step = 1 if interleaved else dim // 2
    return x[..., torch.where(first, i + step, i - step)] * torch.where(first, -1, 1).to(x.dtype)


def transformer_engine(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    assert fused and tensor_format == "sbhd" and start_positions is None and cu_seqlens is None
    assert (cp_size, cp_rank) == (1, 0)
    assert t.dim() == freqs.dim() == 4 and freqs.shape[1:3] == (1, 1)
    assert freqs.dtype == torch.float32, "others are cast at every call"
    assert freqs.is_contiguous() and t.shape[0] <= freqs.shape[0] and freqs.shape[3] == t.shape[3]
    x, freqs = t.float(), freqs[: t.shape[0]]
    return (x * freqs.cos() + quarter_turned(x, interleaved) * freqs.sin()).to(t.dtype)


def apex(t: Tensor, freqs: Tensor, transpose_output: bool, /) -> Tensor:
    """pybind11, without names or defaults."""
    assert t.dim() == freqs.dim() == 4 and freqs.shape[1:3] == (1, 1) and not transpose_output
    assert t.shape[0] == freqs.shape[0] and freqs.shape[3] == t.shape[3]
    assert freqs.dtype == torch.float32 and freqs.is_contiguous()
    return t * freqs.cos().to(t.dtype) + quarter_turned(t, interleaved=False) * freqs.sin().to(t.dtype)


def liger(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    assert q.dim() == k.dim() == 4 and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
    out = []
    for x in (q.transpose(1, 2), k.transpose(1, 2)):
        x = x.contiguous()
        a, b = x.chunk(2, -1)
        c, s = (table[0, :, None, : a.shape[-1]] for table in (cos, sin))
        a_there, b_there = a.to(s.dtype), b.to(s.dtype)
        turned = a_there * c - b_there * s, b_there * c + a_there * s
        a.copy_(turned[0])
        b.copy_(turned[1])
        out.append(x.transpose(1, 2))
    return out[0], out[1]


def flash_attn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    assert not inplace and isinstance(seqlen_offsets, int) and cu_seqlens is None and max_seqlen is None
    _, length, _, dim = x.shape
    assert cos.shape == sin.shape and cos.shape[0] >= seqlen_offsets + length and cos.shape[1] * 2 == dim <= 256
    assert cos.dtype == sin.dtype == x.dtype, "before 2.8"
    c, s = (table.float()[seqlen_offsets:][:length] for table in (cos, sin))
    c, s = (table.repeat_interleave(2, -1) if interleaved else table.repeat(1, 2) for table in (c, s))
    wide = x.float()
    return (wide * c[:, None] + quarter_turned(wide, interleaved) * s[:, None]).to(x.dtype)


STAND_INS: dict[str, tuple[str, Callable[..., Any]]] = {
    "transformer_engine.pytorch.attention.rope": ("apply_rotary_pos_emb", transformer_engine),
    "fused_rotary_positional_embedding": ("forward", apex),
    "liger_kernel.transformers.rope": ("liger_rotary_pos_emb", liger),
    "flash_attn.layers.rotary": ("apply_rotary_emb", flash_attn),
}


class Broken(importlib.abc.MetaPathFinder):
    """Importing what `errors` names raises the error beside it."""

    def __init__(self, errors: dict[str, Exception]) -> None:
        self.errors = errors

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self.errors:
            raise self.errors[name]


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever this machine has."""
    for name in list(sys.modules):
        if name.split(".")[0] in PACKAGES:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken({name: missing(name) for name in PACKAGES}), *sys.meta_path])
    peers._libraries.cache_clear()
    yield
    peers._libraries.cache_clear()


def put(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module and the packages that it is in."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:n]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(sys.modules[name]).update(attributes)


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch, nothing_installed: None) -> None:
    put(monkeypatch, "apex")
    for name, (function, stand_in) in STAND_INS.items():
        put(monkeypatch, name, **{function: stand_in})


def small(dtype: torch.dtype, heads: int = 3) -> tuple[Case, Tensor, Tensor, Tensor]:
    """Ours alone, and q, k and angles; k has one head less than q."""
    grids, q, k, _, _ = cases._rope_inputs(512, heads, dtype, CPU)
    k = k[:, 1:].contiguous()
    tolerance = rope_case(64, 1, dtype, CPU).tolerance
    case = Case("K1", dtype, "", 1, 1, {OURS: lambda: rope3d(q, k, grids, AXES, THETA)}, tolerance)
    return case, q, k, cases._angles(grids, CPU)


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_library_computes_what_ours_does_and_leaves_q_and_k_alone(dtype: torch.dtype) -> None:
    case, q, k, angles = small(dtype)
    before = q.clone(), k.clone()
    found = rope_peers(q, k, angles)
    assert list(found) == NAMES
    case.calls |= {name: call for name, (call, _) in found.items()}
    case.results = {name: result for name, (_, result) in found.items()}
    check(case)
    for call in case.calls.values():
        for _ in range(3):
            assert all(x.dtype == dtype for x in call())
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    check(case)  # after the timing as before it
    for name in NAMES:
        assert [x.shape for x in case.result(name)] == [q.shape, k.shape]


@pytest.mark.usefixtures("all_installed")
def test_on_cuda_the_case_times_them_and_on_the_cpu_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(NAMES) & set(rope_case(512, 3, torch.float32, CPU).calls)
    inputs, angles = cases._rope_inputs, cases._angles
    monkeypatch.setattr(cases, "_rope_inputs", lambda tokens, heads, dtype, _: inputs(tokens, heads, dtype, CPU))
    monkeypatch.setattr(cases, "_angles", lambda grids, _: angles(grids, CPU))
    for dtype in DTYPES:
        case = rope_case(512, 3, dtype, CUDA)
        assert list(case.calls)[-4:] == NAMES and next(iter(case.calls)) == OURS
        eager = {name: call for name, call in case.calls.items() if not name.startswith("compile")}
        check(dataclasses.replace(case, calls=eager))


def test_an_absent_library_is_no_row_and_no_word(caplog: pytest.LogCaptureFixture) -> None:
    _, *inputs = small(torch.float32)
    with caplog.at_level(logging.DEBUG):
        assert rope_peers(*inputs) == {}
    assert not caplog.records


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("name", "module", "error"),
    [
        ("Liger", "liger_kernel.transformers.rope", ImportError("libcudart.so:\n no such file")),
        ("Liger", "liger_kernel.transformers.rope", missing("triton")),
        ("Transformer Engine", "transformer_engine.pytorch.attention.rope", OSError("libnvrtc.so.12: not found")),
        ("apex", "fused_rotary_positional_embedding", None),  # built without its kernels
        ("flash-attn", "flash_attn.layers.rotary", None),  # of version 4 flash_attn.cute alone is there
    ],
)
def test_a_broken_library_is_one_warning_and_no_row(
    name: str,
    module: str,
    error: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delitem(sys.modules, module)
    expected = error or missing(module)
    if error is not None:
        monkeypatch.setattr(sys, "meta_path", [Broken({module: error}), *sys.meta_path])
    _, *inputs = small(torch.float32)
    assert list(rope_peers(*inputs)) == [n for n in NAMES if n != name]
    assert list(rope_peers(*inputs)) == [n for n in NAMES if n != name], "the case of the other dtype"
    (record,) = caplog.records
    reason = " ".join(str(expected).split())
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{name} is installed but not measured: {type(expected).__name__}: {reason}"


@pytest.mark.usefixtures("all_installed")
def test_a_library_without_the_function_is_one_warning_and_no_row(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(monkeypatch, "flash_attn.layers.rotary")
    _, *inputs = small(torch.float32)
    assert list(rope_peers(*inputs)) == NAMES[:-1]
    (record,) = caplog.records
    assert record.getMessage().startswith("flash-attn is installed but not measured: ImportError: cannot import name")


@pytest.mark.parametrize("dim", [2, 4, 10])
def test_halves_are_copies_and_pairs_undo_them(dim: int) -> None:
    x = torch.randn(3, 2, dim)
    halves = to_halves(x)
    assert torch.equal(halves[..., 0], x[..., 0]) and torch.equal(halves[..., dim // 2], x[..., 1])
    assert torch.equal(to_pairs(halves), x)
    before = x.clone()
    halves.zero_()
    assert torch.equal(x, before)
