"""Builds sorahpc._ops (torch ops, LibTorch stable ABI) and sorahpc._C (pybind11); pyproject.toml has all the rest.

Environment:
    SORAHPC_NATIVE        0: install without kernels; the Python references serve (default 1: no compiler is an error)
    SORAHPC_CUDA          auto (default): CUDA kernels if torch has CUDA and nvcc is found; 1: build them or fail; 0: no
    CUDA_HOME             whose bin/nvcc is taken; unset: nvcc on PATH, else that of /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  default 8.0;9.0;10.0+PTX
    SORAHPC_SANITIZE      1: the ops with AddressSanitizer and UBSan, for `make sanitize` (default 0)
    SORAHPC_EMULATE       1: CUDA kernels that run on the CPU, for `make emulate` (default 0)
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The oldest torch whose stable ABI the kernels use; they load in every later one.
TORCH_TARGET = "0x020b000000000000"  # 2.11
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# Without UBSan's check for null, which AddressSanitizer sees too: it takes half of the time to compile.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-omit-frame-pointer", "-g1", "-O1"]
# The CPU kernels are compiled once for each level, and the best that a machine has is taken when the ops are loaded:
# one build runs anywhere, without -march=native. Uninitialized: GCC 12 says so of its own intrinsics.
KERNEL_FLAGS = [*CXX_FLAGS, "-fPIC", "-fno-math-errno", "-Wno-psabi", "-Wno-maybe-uninitialized"]
LEVELS = {
    "v4bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v3": ["-march=x86-64-v3"],
    "base": [],
}
# What a C++ compiler can't read of csrc/cuda/*.cu, in the words of tests/csrc/cuda/cuda_runtime.h. No contraction of a
# product and a sum: the noise is tested to the bit, and nvcc too keeps __fmul_rn apart.
EMULATE = [
    (r"extern __shared__ (\w+) (\w+)\[\];", r"\1* const \2 = emulated::dynamic_shared<\1>();"),
    (r"(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\((.*?)\);", r"emulated::launch({\2}, [=] { \1(\3); });"),
]
EMULATE_FLAGS = ["-Itests/csrc/cuda", "-iquote", "csrc/cuda", "-ffp-contract=off", "-Wno-unknown-pragmas"]
EMULATE_FLAGS += ["-Wno-sign-compare", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # what nvcc doesn't warn of
SHIPPED = ("configs", "slurm")
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"


def fail(message: str) -> None:
    sys.exit(f"sorahpc: {message}")


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        fail(f"{name}={value}: expected {', '.join(allowed)}")
    return value


def torch_dir() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("torch's headers are needed to build: pip install torch==2.13.0, or leave pip's build isolation on")
    return Path(spec.origin).parent


def torch_version() -> tuple[str, str | None]:
    """Version of torch and of its CUDA (None: a CPU build), read without the seconds that importing torch takes."""
    spec = importlib.util.spec_from_file_location("torch_version", torch_dir() / "version.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.__version__, module.cuda


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin/nvcc"] if home else [Path(on_path or "nvcc"), Path("/usr/local/cuda/bin/nvcc")]
    return next((p for p in candidates if p.is_file()), None)


def nvcc_archs(nvcc: Path) -> list[str]:
    """nvcc's arguments for TORCH_CUDA_ARCH_LIST: 9.0 is code for it, +PTX adds what later GPUs compile themselves."""
    asked = subprocess.run([str(nvcc), "--list-gpu-arch"], capture_output=True, text=True)
    if asked.returncode:
        fail(f"{nvcc} --list-gpu-arch: exit code {asked.returncode}; set CUDA_HOME to another CUDA, or SORAHPC_CUDA=0")
    known = asked.stdout.split()
    flags = []
    # Set but empty, as containers have it, is unset: torch takes it so too.
    for arch in (os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            fail(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected e.g. {DEFAULT_ARCHS}")
        if f"compute_{number.rstrip('af')}" not in known:
            fail(
                f"TORCH_CUDA_ARCH_LIST: {nvcc} has no {arch}, only {' '.join(known)}; name those that your GPUs are, "
                "e.g. 8.0;9.0+PTX, or set CUDA_HOME to a newer CUDA, or SORAHPC_CUDA=0 for none"
            )
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildExt(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        # A rebuild takes seconds; one skipped because only SORAHPC_CUDA or a flag changed would take a day to find.
        self.force = True
        self.parallel = self.parallel or 2  # the extensions, one beside the other

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_so_cxx[0]
        if shutil.which(compiler) is None:
            fail(
                f"no C++ compiler ({compiler} not found): install one (Debian: apt install g++), "
                "or install without kernels, slower: SORAHPC_NATIVE=0 pip install ."
            )
        torch, version, torch_cuda = torch_dir(), *torch_version()
        mode = switch("SORAHPC_CUDA", "auto", ("auto", "0", "1"))
        nvcc = find_nvcc()
        if mode == "1" and nvcc is None:
            home = os.environ.get("CUDA_HOME")
            where = f"{home}/bin, where CUDA_HOME is" if home else "PATH or in /usr/local/cuda/bin; set CUDA_HOME"
            fail(f"SORAHPC_CUDA=1, but no nvcc in {where}")
        emulate = switch("SORAHPC_EMULATE", "0", ("0", "1")) == "1"
        cuda = nvcc is not None and not emulate and (mode == "1" or (mode == "auto" and torch_cuda is not None))
        archs = nvcc_archs(nvcc) if cuda else []  # before anything is compiled: a mistake is told at once

        (ops,) = (e for e in self.extensions if e.name == "sorahpc._ops")
        ops.include_dirs = [str(torch / "include")]
        ops.library_dirs = [str(torch / "lib")]
        ops.libraries = ["torch_cpu"]  # already loaded when the ops are: found by its name, without a path of ours
        ops.define_macros = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
        sanitize = SANITIZE if switch("SORAHPC_SANITIZE", "0", ("0", "1")) == "1" else []
        ops.extra_compile_args = [*CXX_FLAGS, *sanitize]
        ops.extra_link_args = sanitize
        here = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"base": []}
        # Of an emulation the CPU kernels are no part; they are there for float64.
        checks = ["-O1"] if emulate else sanitize
        with ThreadPoolExecutor(len(here)) as pool:  # 0.4 GB each
            objects = pool.map(lambda level: self.compile_kernels(compiler, level, [*here[level], *checks]), here)
            ops.extra_objects += objects
        if cuda:
            home = Path(os.path.realpath(nvcc)).parent.parent
            for source in sorted(Path("csrc/cuda").glob("*.cu")):
                ops.extra_objects.append(self.compile_cuda(nvcc, archs, source))
            ops.define_macros.append(("SORAHPC_CUDA", "1"))
            # Static: a library with CUDA kernels then loads beside a CPU-only torch, and any CUDA torch of its driver.
            ops.libraries += ["cudart_static", "dl", "rt", "pthread"]
            ops.library_dirs += [str(p) for p in (cuda_lib(nvcc), home / "lib64", home / "lib") if p and p.is_dir()]

        if emulate:
            with ThreadPoolExecutor(2) as pool:
                sources = sorted(Path("csrc/cuda").glob("*.cu"))
                ops.extra_objects += pool.map(lambda s: self.compile_emulated(compiler, sanitize, s), sources)
            ops.define_macros += [("SORAHPC_CUDA", "1"), ("SORAHPC_EMULATED", "1")]

        info = [e for e in self.extensions if e.name == "sorahpc._C"]
        for extension in info:
            import pybind11

            extension.include_dirs = [pybind11.get_include()]
            extension.extra_compile_args = CXX_FLAGS
            strings = {
                "VERSION": self.distribution.get_version(),
                "CXX_FLAGS": " ".join(CXX_FLAGS),
                "TORCH": version,
                "NVCC": nvcc_version(nvcc) if cuda else "",
                "CUDA_ARCHS": " ".join(a.removeprefix("-gencode=") for a in archs),
            }
            extension.define_macros = [(f"SORAHPC_{name}", f'"{value}"') for name, value in strings.items()]
        if info and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            # The kernels need no Python: a machine with no more than a compiler still works, its cache read by Python.
            print(
                "sorahpc: Python.h not found (Debian: apt install python3-dev): building without sorahpc._C", flush=True
            )
            self.extensions = [ops]
        super().build_extensions()
        print(f"sorahpc: kernels built for CPU{' and CUDA: ' + ' '.join(archs) if cuda else ''}", flush=True)
        if mode == "auto" and torch_cuda is not None and nvcc is None:
            print(f"sorahpc: no nvcc for torch's CUDA {torch_cuda}: on a GPU the Python references serve", flush=True)

    def compile_kernels(self, compiler: str, level: str, flags: list[str]) -> str:
        target = Path(self.build_temp) / f"kernels_{level}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, *KERNEL_FLAGS, *flags, f"-DSORAHPC_LEVEL={level}", "-c", "csrc/cpu/kernels.cpp"]
        if subprocess.run([*command, "-o", str(target)]).returncode != 0:
            fail(f"csrc/cpu/kernels.cpp: {compiler} failed; SORAHPC_NATIVE=0 installs without kernels, slower")
        return str(target)

    def compile_cuda(self, nvcc: Path, archs: list[str], source: Path) -> str:
        target = Path(self.build_temp) / source.with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [str(nvcc), "-c", "-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += [*archs, str(source), "-o", str(target)]
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode != 0:
            fail(f"{source}: nvcc failed; SORAHPC_CUDA=0 builds without CUDA kernels")
        return str(target)

    def compile_emulated(self, compiler: str, flags: list[str], source: Path) -> str:
        target = Path(self.build_temp) / source.with_suffix(".emulated.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        for cuda, cpp in EMULATE:
            text = re.sub(cuda, cpp, text, flags=re.DOTALL)
        copy = target.with_suffix(".cpp")
        copy.write_text(f'#line 1 "{source}"\n{text}')
        command = [compiler, *CXX_FLAGS, "-fPIC", *flags, *EMULATE_FLAGS, "-c", str(copy), "-o", str(target)]
        if subprocess.run(command).returncode != 0:
            fail(f"{source}: {compiler} failed")
        return str(target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def cuda_lib(nvcc: Path) -> Path | None:
    """Where nvcc itself would look for libcudart_static.a."""
    out = subprocess.run([str(nvcc), "-dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    for line in out.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve() / "lib64"
    return None


def nvcc_version(nvcc: Path) -> str:
    out = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return next(line.split("release ")[1] for line in out.splitlines() if "release " in line)


class BuildPy(build_py):
    """Puts configs/ and slurm/ into the package of a wheel; an editable install uses them where they lie."""

    def shipped(self) -> dict[Path, Path]:
        if self.editable_mode:
            return {}
        files = [p for folder in SHIPPED for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
        return {p: Path(self.build_lib) / "sorahpc" / p.relative_to(ROOT) for p in files}

    def run(self) -> None:
        super().run()
        for source, target in self.shipped().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(str(p) for p in self.shipped().values())]


os.chdir(ROOT)
op_sources = [str(p) for p in sorted(Path("csrc/ops").glob("*.cpp"))]
others = [
    str(p) for p in sorted(Path("csrc").rglob("*.*")) if p.suffix in (".h", ".cu", ".cuh") or p.parent.name == "cpu"
]
native = switch("SORAHPC_NATIVE", "1", ("0", "1")) == "1"
if not native:
    print("sorahpc: SORAHPC_NATIVE=0: installing without kernels, the Python references serve", flush=True)
setup(
    ext_modules=[
        Extension("sorahpc._ops", op_sources, depends=others, py_limited_api=True),
        Extension("sorahpc._C", ["csrc/module.cpp"], depends=["csrc/reader.h"], optional=False),
    ]
    if native
    else [],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
