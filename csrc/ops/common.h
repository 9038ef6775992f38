// What the op bodies of this folder share. Only this folder has torch headers, and of those only the LibTorch stable ABI
// (no ATen, c10, pybind or Python), so one build serves many versions of torch and Python, and compiles in seconds.
//
// Schemas, fakes and gradients are defined in sorahpc/ops/*.py; here are only the bodies for CPU and CUDA. Python checks
// what it can see without reading data; what would read or write out of bounds is checked here, always.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"

namespace sorahpc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The schema that a body was written for, the same text as in Python, which compares them before it calls anything: a
// boxed call with other arguments, as after an edit without a rebuild, would read garbage.
struct Schema {
  explicit Schema(const char* text);
};

// The kernels for the best level of this machine's CPU.
const CpuKernels& cpu();

// Whether an op on x takes its CPU kernel. In a build of `make emulate` CUDA's kernels run on the CPU, but for float64,
// which they don't have.
inline bool runs_on_cpu(const Tensor& x) {
#ifdef SORAHPC_EMULATED
  return x.scalar_type() == ScalarType::Double;
#else
  return x.is_cpu();
#endif
}

#ifdef SORAHPC_CUDA
#ifdef SORAHPC_EMULATED
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* const stream = nullptr;
};
#else
void* current_stream(int32_t device);

// x's device is the current one while this lives, and `stream` its current stream.
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
  const torch::stable::accelerator::DeviceGuard guard;
  void* const stream;
};
#endif
#endif

Dtype dtype_of(const Tensor& x);
int64_t item_bytes(Dtype dtype);
// float32, or float64 for float64: what is computed in.
ScalarType compute_type(Dtype dtype);

// On CPU a result beyond this is written past the caches: it would push out what comes next, and each line of it would
// be read before it is written, half as much traffic again. A quarter of a common server's share of last-level cache.
constexpr int64_t STREAM_BYTES = 16 << 20;

// Of a thread's own memory, in whole cache lines.
struct alignas(64) Line {
  char bytes[64];
};

template <typename T = char>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T = char>
T* out_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

#ifdef SORAHPC_CUDA
// What lies in host memory, on `like`'s device; nothing waits.
Tensor copy_to_device(const void* host, int64_t bytes, const Tensor& like);
#endif

// The samples of a pack, and one entry more (see pack.h).
class Samples {
 public:
  // grids int64 CPU [S, 3], each count at least 1, of exactly num_tokens, or of at least that many with `more`.
  static Samples of_grids(const Tensor& grids, int64_t num_tokens, bool more = false);
  // lens int64 CPU [S], each at least 0, of exactly num_tokens in all.
  static Samples of_lens(const Tensor& lens, int64_t num_tokens);

  const Sample* host() const { return table_.data(); }
  int64_t size() const { return int64_t(table_.size()) - 1; }
  // The most that each axis of a grid has, and so the rows of its table of angles.
  std::array<int64_t, 3> largest() const;

#ifdef SORAHPC_CUDA
  // null where the table fits a kernel's arguments, as it does but for packs of very many samples; else a copy on
  // `like`'s device, which must stay alive until the kernel is launched. `most`: of the kernel's arguments.
  const Sample* device(const Tensor& like, int64_t most = MAX_SAMPLES_IN_ARGUMENTS);
#endif

 private:
  std::vector<Sample> table_;
  std::optional<Tensor> copy_;
};

// Calls put(row, i, cosine, sine) for the angles (row * scale + offset) * theta^(-i / n), n of them a row, in order. In
// double; a row by rotation of the one before, ten times as fast, but every 64th: they cost 64 roundings of a double.
template <typename F>
void for_angles(int64_t rows, int64_t n, double theta, double scale, double offset, F&& put) {
  std::vector<double> c(n), s(n), dc(n), ds(n), frequency(n);
  for (int64_t i = 0; i < n; ++i) {
    frequency[i] = std::pow(theta, -double(i) / double(n));
    dc[i] = std::cos(scale * frequency[i]), ds[i] = std::sin(scale * frequency[i]);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) {
      if (row % 64 == 0) {
        const double angle = (double(row) * scale + offset) * frequency[i];
        c[i] = std::cos(angle), s[i] = std::sin(angle);
      } else {
        const double next = c[i] * dc[i] - s[i] * ds[i];
        s[i] = s[i] * dc[i] + c[i] * ds[i], c[i] = next;
      }
      put(row, i, c[i], s[i]);
    }
}

}  // namespace sorahpc
