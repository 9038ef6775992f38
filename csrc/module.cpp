// sorahpc._C: what no op schema carries: how the kernels were built, for `sorahpc doctor` and for reports, and the reader
// of the latent cache.
#include <pybind11/pybind11.h>

#include <string>

#include "reader.h"

namespace py = pybind11;

// setup.py gives these to this file: the flags of the kernels themselves, not of this module.
#if !defined(SORAHPC_VERSION) || !defined(SORAHPC_CXX_FLAGS) || !defined(SORAHPC_CUDA_ARCHS) || \
    !defined(SORAHPC_NVCC) || !defined(SORAHPC_TORCH)
#error "build through setup.py"
#endif

namespace {

// A buffer of int64 [rows, columns] in C order, as numpy gives it.
template <typename Row>
Row* int64_rows(const py::buffer_info& info, const char* name, int64_t columns) {
  static_assert(sizeof(Row) % sizeof(int64_t) == 0);
  const bool fits = (info.format == "l" || info.format == "q") && info.itemsize == 8 && info.ndim == 2 &&
                    info.shape[1] == columns && info.strides[1] == 8 && info.strides[0] == 8 * columns;
  if (!fits) throw py::value_error(std::string(name) + ": int64 [n," + std::to_string(columns) + "] in C order expected");
  return static_cast<Row*>(info.ptr);
}

sorahpc::crc::Update crc_way(const std::string& name) {
  const auto ways = sorahpc::crc::ways();
  if (name == "best") return ways.back().second;
  for (const auto& way : ways)
    if (name == way.first) return way.second;
  throw py::value_error("no way to a crc32 on this machine: " + name);
}

void read_batch(const py::buffer& requests, const py::buffer& results, const py::buffer& out, int threads, bool crc32) {
  const py::buffer_info asked = requests.request(), told = results.request(true), to = out.request(true);
  const auto* rows = int64_rows<const sorahpc::ReadRequest>(asked, "requests", 4);
  auto* answers = int64_rows<sorahpc::ReadResult>(told, "results", 3);
  const int64_t count = asked.shape[0];
  if (told.shape[0] != count) throw py::value_error("results: a row a request expected");
  if (to.ndim != 1 || to.itemsize != 1 || to.strides[0] != 1) throw py::value_error("out: flat bytes expected");
  if (threads < 1) throw py::value_error("threads: 1 or more expected");
  for (int64_t i = 0; i < count; ++i) {
    const sorahpc::ReadRequest& r = rows[i];
    if (r.nbytes < 0 || r.offset < 0 || r.at < 0 || r.at > to.shape[0] || r.nbytes > to.shape[0] - r.at)
      throw py::value_error("request " + std::to_string(i) + " ends outside out");
  }
  const sorahpc::crc::Update update = crc32 ? crc_way("best") : nullptr;
  py::gil_scoped_release released;
  sorahpc::read_batch(rows, answers, count, static_cast<unsigned char*>(to.ptr), threads, update);
}

}  // namespace

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
  m.def("read_batch", &read_batch, py::arg("requests"), py::arg("results"), py::arg("out"), py::arg("threads"),
        py::arg("crc32"),
        "Read many pieces of open files into `out` (bytes), without the GIL. requests: int64 [n,4], a row (fd, offset, "
        "nbytes, place in out); results: int64 [n,3], written: (errno or 0, bytes read, crc32 of them or 0).");
  m.def(
      "crc32",
      [](const py::buffer& data, uint32_t value, const std::string& way) {
        const py::buffer_info info = data.request();
        if (info.ndim != 1 || info.strides[0] != info.itemsize) throw py::value_error("data: flat bytes expected");
        const auto update = crc_way(way);
        py::gil_scoped_release released;
        return ~update(~value, static_cast<const unsigned char*>(info.ptr), size_t(info.size * info.itemsize));
      },
      py::arg("data"), py::arg("value") = 0, py::arg("way") = "best", "zlib's crc32 of bytes, going on from `value`.");
  m.def(
      "crc32_ways",
      [] {
        py::list names;
        for (const auto& way : sorahpc::crc::ways()) names.append(way.first);
        return names;
      },
      "The ways to a crc32 that this machine has, slowest first.");
}
