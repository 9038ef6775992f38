// sincos3d, add_sincos3d and timestep_embedding.
#include "common.h"

namespace sorahpc {
namespace {

#ifdef SORAHPC_CUDA
extern "C" int sorahpc_sincos3d_cuda(const Sincos3d* op, const Sample* samples, int64_t num_samples,
                                     const Sample* on_device, void* stream);
extern "C" int sorahpc_timesteps_cuda(const float* t, float* out, int64_t num_t, int64_t half, double scale,
                                      double max_period, void* stream);
#endif

template <typename C>
void on_cpu(const Sincos3d& op, const Samples& samples) {
  // A row for each index, sines, then cosines; the axes' are the same.
  const auto rows = samples.largest();
  const int64_t most = *std::max_element(rows.begin(), rows.end()), half = op.half;
  std::vector<C> table(most * 2 * half);
  for_angles(most, half, op.theta, 1, 0, [&](int64_t row, int64_t i, double c, double s) {
    table[row * 2 * half + i] = C(s), table[row * 2 * half + half + i] = C(c);
  });
  const int64_t grain = std::max<int64_t>(1, 65536 / (6 * op.half));  // 64 k elements a thread at least
  torch::stable::parallel_for(0, op.num_tokens, grain, [&](int64_t begin, int64_t end) {
    cpu().sincos3d(&op, table.data(), samples.host(), samples.size(), begin, end);
  });
}

Sincos3d params(int64_t dim, double theta, int64_t first, int64_t length, Dtype dtype) {
  STD_TORCH_CHECK(dim >= 6 && dim % 6 == 0 && dim <= 6 << 20, "dim: ", dim, ", expected a multiple of 6, to 6 * 2^20");
  STD_TORCH_CHECK(theta > 0, "theta: ", theta, ", expected more than 0");
  const int64_t most = int64_t(1) << 50;  // as of_grids; so that their sum can't overflow
  STD_TORCH_CHECK(first >= 0 && first <= most && length >= 0 && length <= most, "first: ", first, ", length: ", length,
                  ", expected 0 to 2^50");
  Sincos3d op{};
  op.dtype = dtype;
  op.first = first, op.num_tokens = length, op.half = int32_t(dim / 6), op.theta = theta;
  // Whole vectors at aligned places only; 16 is the widest.
  op.stream = length > STREAM_BYTES / (dim * item_bytes(dtype)) && dim / 3 % 16 == 0;
  return op;
}

// op's tokens, into new memory beside `like`; op.x is what they are added to, or null.
Tensor embed(Sincos3d& op, const Tensor& like, const Tensor& grids) {
  Samples samples = Samples::of_grids(grids, op.first + op.num_tokens, true);
  Tensor out = torch::stable::new_empty(like, {op.num_tokens, int64_t(6) * op.half});
  if (op.num_tokens == 0) return out;
  op.out = out_data(out);
  if (runs_on_cpu(like)) {
    op.dtype == Dtype::f64 ? on_cpu<double>(op, samples) : on_cpu<float>(op, samples);
    return out;
  }
#ifdef SORAHPC_CUDA
  STD_TORCH_CHECK(op.dtype != Dtype::f64, "sincos3d: float64 is for CPU");
  const OnDevice on(like);
  const int error = sorahpc_sincos3d_cuda(&op, samples.host(), samples.size(), samples.device(like), on.stream);
  STD_TORCH_CHECK(error == 0, "sincos3d: CUDA error ", error, " at launch");
#endif
  return out;
}

Tensor sincos3d(const Tensor& like, const Tensor& grids, int64_t dim, double theta, int64_t first, int64_t length) {
  Sincos3d op = params(dim, theta, first, length, dtype_of(like));
  return embed(op, like, grids);
}

Tensor add_sincos3d(const Tensor& x, const Tensor& grids, double theta, int64_t first) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected [L, dim]");
  Sincos3d op = params(x.size(1), theta, first, x.size(0), dtype_of(x));
  const Tensor in = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  op.x = data(in), op.x_stride = in.stride(0);
  return embed(op, in, grids);
}

Tensor timestep_embedding(const Tensor& t, int64_t dim, double scale, double max_period) {
  STD_TORCH_CHECK(t.dim() == 1, "t: expected one dim");
  STD_TORCH_CHECK(dim >= 2 && dim % 2 == 0 && dim <= 1 << 24, "dim: ", dim, ", expected an even number, to 2^24");
  STD_TORCH_CHECK(max_period > 0, "max_period: ", max_period, ", expected more than 0");
  const ScalarType type = compute_type(dtype_of(t));
  const Tensor in = torch::stable::contiguous(torch::stable::to(t, type));
  Tensor out = torch::stable::new_empty(in, {t.size(0), dim});
  const int64_t half = dim / 2;
  if (t.size(0) == 0) return out;
  if (runs_on_cpu(in)) {
    std::vector<double> exact(half);
    for (int64_t i = 0; i < half; ++i) exact[i] = std::exp(-std::log(max_period) * double(i) / double(half));
    const std::vector<float> rounded(exact.begin(), exact.end());
    const bool as_double = type == ScalarType::Double;
    const Timesteps op{data<void>(in), out_data<void>(out), as_double ? (const void*)exact.data() : rounded.data(),
                       t.size(0), half, scale};
    const int64_t grain = std::max<int64_t>(1, 16384 / half);
    torch::stable::parallel_for(0, t.size(0), grain,
                                [&](int64_t begin, int64_t end) { cpu().timesteps(&op, as_double, begin, end); });
    return out;
  }
#ifdef SORAHPC_CUDA
  STD_TORCH_CHECK(type == ScalarType::Float, "timestep_embedding: float64 is for CPU");
  const OnDevice on(in);
  const int error = sorahpc_timesteps_cuda(data<float>(in), out_data<float>(out), t.size(0), half, scale, max_period,
                                           on.stream);
  STD_TORCH_CHECK(error == 0, "timestep_embedding: CUDA error ", error, " at launch");
#endif
  return out;
}

const Schema schemas[] = {
    Schema("sincos3d(Tensor like, Tensor grids, int dim, float theta, SymInt first, SymInt length) -> Tensor"),
    Schema("add_sincos3d(Tensor x, Tensor grids, float theta, SymInt first) -> Tensor"),
    Schema("timestep_embedding(Tensor t, int dim, float scale, float max_period) -> Tensor")};

}  // namespace
}  // namespace sorahpc

STABLE_TORCH_LIBRARY_IMPL(sorahpc, CPU, m) {
  m.impl("sincos3d", TORCH_BOX(&sorahpc::sincos3d));
  m.impl("add_sincos3d", TORCH_BOX(&sorahpc::add_sincos3d));
  m.impl("timestep_embedding", TORCH_BOX(&sorahpc::timestep_embedding));
}

#ifdef SORAHPC_CUDA
STABLE_TORCH_LIBRARY_IMPL(sorahpc, CUDA, m) {
  m.impl("sincos3d", TORCH_BOX(&sorahpc::sincos3d));
  m.impl("add_sincos3d", TORCH_BOX(&sorahpc::add_sincos3d));
  m.impl("timestep_embedding", TORCH_BOX(&sorahpc::timestep_embedding));
}
#endif
