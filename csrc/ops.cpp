// Registers the compiled ops: the only file with torch headers. It uses the LibTorch stable ABI alone (no ATen, c10,
// pybind or Python), so one build serves many versions of torch and Python, and compiles in seconds.
//
// Schemas, fakes and gradients are defined in sorahpc/ops/*.py; here are only the bodies for CPU and CUDA. Python checks
// what it can see without reading data; what would read or write out of bounds is checked here, always.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#ifdef SORAHPC_CUDA
#include <dlfcn.h>
#endif

#include "patchify.h"

// The schemas that the bodies below were written for, one a line. Python compares them with its own before it calls
// anything: a boxed call with other arguments, as after an edit without a rebuild, would read garbage.
extern "C" __attribute__((visibility("default"))) const char* sorahpc_schemas() {
  return "patchify(Tensor latents, Tensor grids, int channels, int pt, int ph, int pw, bool channels_last) -> Tensor\n"
         "unpatchify(Tensor tokens, Tensor grids, int channels, int pt, int ph, int pw, bool channels_last) -> Tensor\n";
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef SORAHPC_CUDA
// The stream that torch works on. libtorch_cuda is looked up at run time, so that this library loads beside a CPU-only
// torch too; torch loads it RTLD_LOCAL, hence not through RTLD_DEFAULT.
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

int item_bytes(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Float: return 4;
    case ScalarType::Double: return 8;
    default: STD_TORCH_CHECK(false, "dtype: expected float16, bfloat16, float32 or float64"); return 0;
  }
}

struct Sample {
  int64_t T, H, W, first_token, first_row;  // a row: the W tokens of one (t, h)
};

// Checked samples of grids int64 CPU [S,3] that hold num_tokens tokens in all.
std::vector<Sample> samples_of(const Tensor& grids, int64_t num_tokens) {
  STD_TORCH_CHECK(grids.is_cpu() && grids.scalar_type() == ScalarType::Long && grids.dim() == 2 && grids.size(1) == 3,
                  "grids: expected int64 on CPU [samples, 3]");
  const Tensor dense = torch::stable::contiguous(grids);
  const int64_t* g = static_cast<const int64_t*>(dense.const_data_ptr());
  std::vector<Sample> samples(dense.size(0));
  int64_t token = 0, row = 0;
  for (size_t i = 0; i < samples.size(); ++i, g += 3) {
    // Each factor within int32 and each product within num_tokens: nothing overflows on the way.
    for (int a = 0; a < 3; ++a)
      STD_TORCH_CHECK(g[a] >= 1 && g[a] <= std::numeric_limits<int32_t>::max(), "grids: sample ", i, " is (", g[0], ", ",
                      g[1], ", ", g[2], "), expected counts of at least 1");
    const bool fits = g[0] <= num_tokens && g[0] * g[1] <= num_tokens && g[0] * g[1] * g[2] <= num_tokens - token;
    STD_TORCH_CHECK(fits, "grids: more than the ", num_tokens, " tokens given, at sample ", i);
    samples[i] = {g[0], g[1], g[2], token, row};
    token += g[0] * g[1] * g[2];
    row += g[0] * g[1];
  }
  STD_TORCH_CHECK(token == num_tokens, "grids: ", token, " tokens, expected ", num_tokens);
  return samples;
}

// Both directions. Input: latents [L * P] or tokens [L, P]; the other is returned.
Tensor patchify_any(const Tensor& input, const Tensor& grids, const sorahpc::Patchify& op, bool to_tokens) {
  const auto within = [](int64_t x, int64_t most) { return x >= 1 && x <= most; };
  STD_TORCH_CHECK(within(op.channels, 1 << 20) && within(op.pt, 1 << 12) && within(op.ph, 1 << 12) &&
                      within(op.pw, 1 << 12),
                  "channels: expected 1 to 2^20, patch: 1 to 2^12 on each axis");  // so that P can't overflow
  const int64_t P = op.token_size();
  if (to_tokens) {
    STD_TORCH_CHECK(input.dim() == 1 && input.numel() % P == 0, "latents: expected [L * ", P, "] in one dim");
  } else {
    STD_TORCH_CHECK(input.dim() == 2 && input.size(1) == P, "tokens: expected [L, ", P, "]");
  }
  const int64_t L = input.numel() / P;
  const int bytes = item_bytes(input);
  const std::vector<Sample> samples = samples_of(grids, L);

  const Tensor source = torch::stable::contiguous(input);
  const std::vector<int64_t> shape = to_tokens ? std::vector<int64_t>{L, P} : std::vector<int64_t>{L * P};
  Tensor result = torch::stable::new_empty(source, shape);
  if (L == 0) return result;
  // One pointer for each side; the kernels write only the one that `to_tokens` names.
  char* const in = const_cast<char*>(static_cast<const char*>(source.const_data_ptr()));
  char* const out = static_cast<char*>(result.mutable_data_ptr());
  char* const latents = to_tokens ? in : out;
  char* const tokens = to_tokens ? out : in;

  if (source.is_cpu()) {
    const int64_t num_rows = samples.back().first_row + samples.back().T * samples.back().H;
    const int64_t grain = std::max<int64_t>(1, 65536 * num_rows / (L * P));  // 64 k elements a thread at least
    torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
      auto s = std::upper_bound(samples.begin(), samples.end(), begin,
                                [](int64_t row, const Sample& x) { return row < x.first_row; }) - 1;
      for (int64_t row = begin; row < end; ++row) {
        if (row == s->first_row + s->T * s->H) ++s;
        const int64_t base = s->first_token * P * bytes;
        sorahpc_patchify_row_cpu(&op, bytes, to_tokens, s->T, s->H, s->W, row - s->first_row, latents + base,
                                 tokens + base);
      }
    });
    return result;
  }
#ifdef SORAHPC_CUDA
  const torch::stable::accelerator::DeviceGuard guard(source.get_device_index());
  const Tensor dense = torch::stable::contiguous(grids);
  const int error =
      sorahpc_patchify_cuda(&op, bytes, to_tokens, static_cast<const int64_t*>(dense.const_data_ptr()), dense.size(0),
                            latents, tokens, current_stream(source.get_device_index()));
  STD_TORCH_CHECK(error == 0, "patchify: CUDA error ", error, " at launch");
#endif
  return result;
}

Tensor patchify(const Tensor& latents, const Tensor& grids, int64_t channels, int64_t pt, int64_t ph, int64_t pw,
                bool channels_last) {
  return patchify_any(latents, grids, {channels, pt, ph, pw, channels_last}, true);
}

Tensor unpatchify(const Tensor& tokens, const Tensor& grids, int64_t channels, int64_t pt, int64_t ph, int64_t pw,
                  bool channels_last) {
  return patchify_any(tokens, grids, {channels, pt, ph, pw, channels_last}, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sorahpc, CPU, m) {
  m.impl("patchify", TORCH_BOX(&patchify));
  m.impl("unpatchify", TORCH_BOX(&unpatchify));
}

#ifdef SORAHPC_CUDA
STABLE_TORCH_LIBRARY_IMPL(sorahpc, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&patchify));
  m.impl("unpatchify", TORCH_BOX(&unpatchify));
}
#endif
