// flow_patchify.
#include "units.h"

namespace sorahpc {
namespace {

std::vector<Draw> draws_of(const Tensor& t, const Tensor& ids, int64_t num_samples) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == num_samples,
                  "t: expected float32 on CPU [", num_samples, "]");
  STD_TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.dim() == 2 &&
                      ids.size(0) == num_samples && ids.size(1) == 2,
                  "ids: expected int64 on CPU [", num_samples, ", 2]");
  const Tensor dense_t = torch::stable::contiguous(t), dense_ids = torch::stable::contiguous(ids);
  std::vector<Draw> draws(num_samples);
  for (int64_t i = 0; i < num_samples; ++i) {
    const float at = data<float>(dense_t)[i];
    const int64_t id = data<int64_t>(dense_ids)[2 * i], visit = data<int64_t>(dense_ids)[2 * i + 1];
    STD_TORCH_CHECK(at >= 0 && at <= 1, "t: ", at, " of sample ", i, ", expected 0 to 1");
    STD_TORCH_CHECK(id >= 0 && visit >= 0 && visit < int64_t(1) << 32, "ids: sample ", i, " is (", id, ", ", visit,
                    "), expected an id of at least 0 and a visit of 0 to 2^32 - 1");
    draws[i] = {uint64_t(id), uint32_t(visit), at};
  }
  return draws;
}

std::tuple<Tensor, Tensor> flow_patchify(const Tensor& latents, const Tensor& t, const Tensor& ids, const Tensor& grids,
                                         int64_t channels, int64_t pt, int64_t ph, int64_t pw, bool channels_last,
                                         int64_t seed, int64_t target) {
  const auto within = [](int64_t x, int64_t most) { return x >= 1 && x <= most; };
  STD_TORCH_CHECK(within(channels, 1 << 20) && within(pt, 1 << 12) && within(ph, 1 << 12) && within(pw, 1 << 12),
                  "channels: expected 1 to 2^20, patch: 1 to 2^12 on each axis");  // so that P can't overflow
  STD_TORCH_CHECK(seed >= 0, "seed: ", seed, ", expected at least 0");
  STD_TORCH_CHECK(target >= 0 && target <= 2, "target: ", target, ", expected 0 to 2");
  FlowPatchify op{};
  op.patch = {channels, pt, ph, pw, channels_last};
  op.dtype = dtype_of(latents);
  op.target = Target(target);
  op.seed = uint64_t(seed);
  const int64_t P = op.patch.token_size(), bytes = item_bytes(op.dtype);
  STD_TORCH_CHECK(latents.dim() == 1 && latents.numel() % P == 0, "latents: expected [L * ", P, "] in one dim");
  const int64_t L = latents.numel() / P;
  Samples samples = Samples::of_grids(grids, L);
  const Sample* table = samples.host();
  for (int64_t i = 0; i < samples.size(); ++i)
    STD_TORCH_CHECK((table[i + 1].first_token - table[i].first_token) * P <= MAX_NOISE, "grids: sample ", i,
                    " has more than the 2^34 elements that noise can be drawn for");
  const std::vector<Draw> draws = draws_of(t, ids, samples.size());

  const Tensor source = torch::stable::contiguous(latents);
  std::tuple<Tensor, Tensor> out{torch::stable::new_empty(source, {L, P}), torch::stable::new_empty(source, {L, P})};
  if (L == 0) return out;
  const char* in = data(source);
  char* const tokens = out_data(std::get<0>(out));
  char* const learned = out_data(std::get<1>(out));

  if (runs_on_cpu(source)) {
    for_units(samples, op.patch, bytes, 2, 16384, [&](int64_t i, int64_t t, int64_t h0, int64_t h1, char* scratch) {
      const int64_t base = table[i].first_token * P * bytes;
      cpu().flow_patchify(&op, &draws[i], table + i, t, h0, h1, in + base, tokens + base, learned + base, scratch);
    });
    return out;
  }
#ifdef SORAHPC_CUDA
  STD_TORCH_CHECK(op.dtype != Dtype::f64, "flow_patchify: float64 is for CPU");
  const OnDevice on(source);
  const Sample* far = samples.device(source, MAX_NOISED_IN_ARGUMENTS);
  std::optional<Tensor> far_draws;
  if (far != nullptr) far_draws = copy_to_device(draws.data(), int64_t(draws.size() * sizeof(Draw)), source);
  const int error = sorahpc_flow_patchify_cuda(&op, table, draws.data(), samples.size(), far,
                                               far_draws ? data<Draw>(*far_draws) : nullptr, in, tokens, learned,
                                               on.stream);
  STD_TORCH_CHECK(error == 0, "flow_patchify: CUDA error ", error, " at launch");
#endif
  return out;
}

const Schema schema_flow_patchify(
    "flow_patchify(Tensor latents, Tensor t, Tensor ids, Tensor grids, int channels, int pt, int ph, int pw, bool "
    "channels_last, SymInt seed, int target) -> (Tensor, Tensor)");

}  // namespace
}  // namespace sorahpc

STABLE_TORCH_LIBRARY_IMPL(sorahpc, CPU, m) { m.impl("flow_patchify", TORCH_BOX(&sorahpc::flow_patchify)); }
#ifdef SORAHPC_CUDA
STABLE_TORCH_LIBRARY_IMPL(sorahpc, CUDA, m) { m.impl("flow_patchify", TORCH_BOX(&sorahpc::flow_patchify)); }
#endif
