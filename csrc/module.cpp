// sorahpc._C: what no op schema carries. Today: how the kernels were built, for `sorahpc doctor` and for reports.
#include <pybind11/pybind11.h>

namespace py = pybind11;

// setup.py gives these to this file: the flags of the kernels themselves, not of this module.
#if !defined(SORAHPC_VERSION) || !defined(SORAHPC_CXX_FLAGS) || !defined(SORAHPC_CUDA_ARCHS) || \
    !defined(SORAHPC_NVCC) || !defined(SORAHPC_TORCH)
#error "build through setup.py"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native parts of sorahpc that are not torch ops.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = SORAHPC_VERSION;
#ifdef __clang__
        info["compiler"] = "clang " __clang_version__;
#else
        info["compiler"] = "gcc " __VERSION__;
#endif
        info["cxx_flags"] = SORAHPC_CXX_FLAGS;
        info["torch"] = SORAHPC_TORCH;
        info["nvcc"] = SORAHPC_NVCC;
        info["cuda_archs"] = SORAHPC_CUDA_ARCHS;
        return info;
      },
      "How the kernels were built: version, compiler, cxx_flags, torch (headers), nvcc and cuda_archs (\"\" without CUDA).");
}
