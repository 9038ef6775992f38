// patchify and unpatchify.
#include "units.h"

namespace sorahpc {
namespace {

// Both directions. Input: latents [L * P] or tokens [L, P]; the other is returned.
Tensor patchify_any(const Tensor& input, const Tensor& grids, const Patchify& op, bool to_tokens) {
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
  const int bytes = int(item_bytes(dtype_of(input)));
  Samples samples = Samples::of_grids(grids, L);

  const Tensor source = torch::stable::contiguous(input);
  const std::vector<int64_t> shape = to_tokens ? std::vector<int64_t>{L, P} : std::vector<int64_t>{L * P};
  Tensor result = torch::stable::new_empty(source, shape);
  if (L == 0) return result;
  // One pointer for each side; the kernels write only the one that `to_tokens` names.
  char* const in = const_cast<char*>(data(source));
  char* const out = out_data(result);
  char* const latents = to_tokens ? in : out;
  char* const tokens = to_tokens ? out : in;

  if (runs_on_cpu(source)) {
    for_units(samples, op, bytes, 1, 65536, [&](int64_t i, int64_t t, int64_t h0, int64_t h1, char* scratch) {
      const int64_t base = samples.host()[i].first_token * P * bytes;
      cpu().patchify(&op, bytes, to_tokens, samples.host() + i, t, h0, h1, latents + base, tokens + base, scratch);
    });
    return result;
  }
#ifdef SORAHPC_CUDA
  const OnDevice on(source);
  const int error = sorahpc_patchify_cuda(&op, bytes, to_tokens, samples.host(), samples.size(), samples.device(source),
                                          latents, tokens, on.stream);
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

const Schema schema_patchify(
    "patchify(Tensor latents, Tensor grids, int channels, int pt, int ph, int pw, bool channels_last) -> Tensor");
const Schema schema_unpatchify(
    "unpatchify(Tensor tokens, Tensor grids, int channels, int pt, int ph, int pw, bool channels_last) -> Tensor");

}  // namespace
}  // namespace sorahpc

STABLE_TORCH_LIBRARY_IMPL(sorahpc, CPU, m) {
  m.impl("patchify", TORCH_BOX(&sorahpc::patchify));
  m.impl("unpatchify", TORCH_BOX(&sorahpc::unpatchify));
}

#ifdef SORAHPC_CUDA
STABLE_TORCH_LIBRARY_IMPL(sorahpc, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&sorahpc::patchify));
  m.impl("unpatchify", TORCH_BOX(&sorahpc::unpatchify));
}
#endif
