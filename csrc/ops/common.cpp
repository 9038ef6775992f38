#include "common.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(SORAHPC_CUDA) && !defined(SORAHPC_EMULATED)
#include <dlfcn.h>
#endif

namespace sorahpc {

namespace {

std::string& schemas() {
  static std::string text;  // one a line
  return text;
}

}  // namespace

Schema::Schema(const char* text) { schemas().append(text).append("\n"); }

const CpuKernels& cpu() {
#if defined(__x86_64__)
  static const CpuKernels& best = []() -> const CpuKernels& {
    struct Level {
      const char* name;
      bool here;
      const CpuKernels& kernels;
    };
    __builtin_cpu_init();
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const Level levels[] = {{"v4bf16", v3 && v4 && __builtin_cpu_supports("avx512bf16"), sorahpc_cpu_v4bf16},
                            {"v4", v3 && v4, sorahpc_cpu_v4},
                            {"v3", v3, sorahpc_cpu_v3},
                            {"base", true, sorahpc_cpu_base}};
    // For tests: no level above this one.
    const char* most = std::getenv("SORAHPC_CPU_LEVEL");
    bool allowed = most == nullptr;
    for (const Level& level : levels) {
      allowed = allowed || std::strcmp(most, level.name) == 0;
      if (allowed && level.here) return level.kernels;
    }
    STD_TORCH_CHECK(false, "SORAHPC_CPU_LEVEL=", most, ": expected v4bf16, v4, v3 or base");
    return sorahpc_cpu_base;
  }();
  return best;
#else
  return sorahpc_cpu_base;
#endif
}

#if defined(SORAHPC_CUDA) && !defined(SORAHPC_EMULATED)
// libtorch_cuda is looked up at run time, so that this library loads beside a CPU-only torch too; torch loads it
// RTLD_LOCAL, hence not through RTLD_DEFAULT.
void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "libtorch_cuda.so is not loaded, or has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "no current CUDA stream on device ", device);
  return stream;
}
#endif

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, "dtype: expected float16, bfloat16, float32 or float64"); return Dtype::f32;
  }
}

int64_t item_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

ScalarType compute_type(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

Samples Samples::of_grids(const Tensor& grids, int64_t num_tokens, bool more) {
  STD_TORCH_CHECK(grids.is_cpu() && grids.scalar_type() == ScalarType::Long && grids.dim() == 2 && grids.size(1) == 3,
                  "grids: expected int64 on CPU [samples, 3]");
  const Tensor dense = torch::stable::contiguous(grids);
  const int64_t* g = data<int64_t>(dense);
  // Far beyond any pack, and small enough that nothing overflows on the way.
  const int64_t most = more ? int64_t(1) << 50 : num_tokens;
  Samples samples;
  samples.table_.resize(dense.size(0) + 1);
  int64_t token = 0;
  for (int64_t i = 0; i < dense.size(0); ++i, g += 3) {
    for (int a = 0; a < 3; ++a)
      STD_TORCH_CHECK(g[a] >= 1 && g[a] <= std::numeric_limits<int32_t>::max(), "grids: sample ", i, " is (", g[0], ", ",
                      g[1], ", ", g[2], "), expected counts of at least 1");
    const int64_t left = most - token;
    const bool fits = g[0] <= left && g[1] <= left / g[0] && g[2] <= left / g[0] / g[1];
    STD_TORCH_CHECK(fits, "grids: more than the ", most, " tokens given, at sample ", i);
    samples.table_[i] = {token, int32_t(g[0]), int32_t(g[1]), int32_t(g[2])};
    token += g[0] * g[1] * g[2];
  }
  samples.table_.back() = {token, 0, 0, 0};
  STD_TORCH_CHECK(more ? token >= num_tokens : token == num_tokens, "grids: ", token, " tokens, expected ",
                  more ? "at least " : "", num_tokens);
  return samples;
}

std::array<int64_t, 3> Samples::largest() const {
  std::array<int64_t, 3> most{};
  for (const Sample& s : table_) {
    most[0] = std::max<int64_t>(most[0], s.T);
    most[1] = std::max<int64_t>(most[1], s.H);
    most[2] = std::max<int64_t>(most[2], s.W);
  }
  return most;
}

Samples Samples::of_lens(const Tensor& lens, int64_t num_tokens) {
  STD_TORCH_CHECK(lens.is_cpu() && lens.scalar_type() == ScalarType::Long && lens.dim() == 1,
                  "lens: expected int64 on CPU [samples]");
  const Tensor dense = torch::stable::contiguous(lens);
  Samples samples;
  samples.table_.resize(dense.size(0) + 1);
  int64_t token = 0;
  for (int64_t i = 0; i < dense.size(0); ++i) {
    const int64_t len = data<int64_t>(dense)[i];
    STD_TORCH_CHECK(len >= 0 && len <= num_tokens - token, "lens: sample ", i, " has ", len, " tokens, ",
                    num_tokens - token, " are left");
    samples.table_[i] = {token, 1, 1, int32_t(std::min<int64_t>(len, std::numeric_limits<int32_t>::max()))};
    token += len;
  }
  samples.table_.back() = {token, 0, 0, 0};
  STD_TORCH_CHECK(token == num_tokens, "lens: ", token, " tokens, expected ", num_tokens);
  return samples;
}

#ifdef SORAHPC_CUDA
Tensor copy_to_device(const void* host, int64_t bytes, const Tensor& like) {
  const torch::stable::Device cpu_device(torch::headeronly::DeviceType::CPU);
  // By way of pinned memory, which torch doesn't hand out again before the copy has read it, so nothing waits. When CUDA
  // has read pageable memory it doesn't promise: `host` may be freed before, or the call may wait for the stream.
  const bool pinned = !like.is_cpu();  // else `make emulate`
  Tensor staged = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, cpu_device, pinned, std::nullopt);
  std::memcpy(out_data(staged), host, bytes);
  Tensor copy = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  torch::stable::copy_(copy, staged, true);
  return copy;
}

const Sample* Samples::device(const Tensor& like, int64_t most) {
  if (size() <= most) return nullptr;
  if (!copy_) copy_ = copy_to_device(table_.data(), int64_t(table_.size() * sizeof(Sample)), like);
  return data<Sample>(*copy_);
}
#endif

}  // namespace sorahpc

extern "C" __attribute__((visibility("default"))) const char* sorahpc_schemas() {
  return sorahpc::schemas().c_str();
}
