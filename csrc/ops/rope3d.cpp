// rope3d, and with the per-head RMS norm of q and k in front, forward and backward.
#include "common.h"

namespace sorahpc {
namespace {

#ifdef SORAHPC_CUDA
extern "C" int sorahpc_rope3d_cuda(const Rope3d* op, const Sample* samples, int64_t num_samples,
                                   const Sample* on_device, int64_t num_chunks, void* stream);
#endif

// Tables of cos and sin, one an axis, a row for each of its positions: a row holds what a head's loop reads, cos and then
// sin of its pairs, or each cos twice and then -sin, +sin.
template <typename C>
std::vector<C> fill_tables(const Rope3d& op, const Samples& samples, const void** tables) {
  const auto rows = samples.largest();
  const int copies = op.angles_twice() ? 2 : 1;
  const double sign = op.inverse ? -1.0 : 1.0;
  int64_t pairs[3], total = 0;
  for (int a = 0; a < 3; ++a) {
    pairs[a] = op.axis_end[a] - (a ? op.axis_end[a - 1] : 0);
    total += rows[a] * pairs[a] * 2 * copies;
  }
  std::vector<C> all(total);
  C* table = all.data();
  for (int a = 0; a < 3; table += rows[a] * pairs[a] * 2 * copies, ++a) {
    tables[a] = table;
    const auto put = [&](int64_t row, int64_t i, double c, double s) {
      C* const cos = table + row * pairs[a] * 2 * copies + i * copies;
      C* const sin = cos + pairs[a] * copies;
      cos[0] = cos[copies - 1] = C(c);
      sin[copies - 1] = C(sign * s);
      if (copies == 2) sin[0] = C(-sign * s);
    };
    for_angles(rows[a], pairs[a], op.theta[a], op.scale[a], op.offset[a], put);
  }
  return all;
}

void check_three(const char* name, size_t n) { STD_TORCH_CHECK(n == 3, name, ": ", n, " numbers, expected 3"); }

Rope3d params(const Tensor& q, const Tensor& k, const std::vector<int64_t>& axes_dim, const std::vector<double>& theta,
              const std::vector<double>& offset, const std::vector<double>& scale, int64_t first, bool interleaved) {
  check_three("axes_dim", axes_dim.size());
  check_three("theta", theta.size());
  check_three("offset", offset.size());
  check_three("scale", scale.size());
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(0) == k.size(0) && q.size(2) == k.size(2),
                  "q, k: expected [L, heads, D] with the same L and D");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.get_device_index() == k.get_device_index() &&
                      q.is_cpu() == k.is_cpu(),
                  "q, k: expected the same dtype and device");
  STD_TORCH_CHECK(q.size(2) <= MAX_HEAD_DIM, "head dim ", q.size(2), ", expected at most ", MAX_HEAD_DIM);
  STD_TORCH_CHECK(first >= 0 && first <= int64_t(1) << 50, "first: ", first, ", expected 0 to 2^50");
  Rope3d op{};
  op.dtype = dtype_of(q);
  op.first = first;
  op.num_tokens = q.size(0);
  op.head_dim = int32_t(q.size(2));
  op.interleaved = interleaved;
  int64_t pairs = 0;
  for (int a = 0; a < 3; ++a) {
    STD_TORCH_CHECK(axes_dim[a] >= 0 && axes_dim[a] % 2 == 0 && axes_dim[a] <= q.size(2), "axes_dim: ", axes_dim[a],
                    ", expected an even number of at most ", q.size(2));
    STD_TORCH_CHECK(theta[a] > 0, "theta: ", theta[a], ", expected more than 0");
    pairs += axes_dim[a] / 2;
    op.axis_end[a] = int32_t(pairs);
    op.theta[a] = theta[a], op.offset[a] = offset[a], op.scale[a] = scale[a];
  }
  STD_TORCH_CHECK(2 * pairs == q.size(2), "axes_dim: sums to ", 2 * pairs, ", expected the head dim ", q.size(2));
  return op;
}

// [L, heads, D] as the kernels take it: D contiguous, tokens and heads anywhere.
Tensor dense_heads(const Tensor& x) { return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x); }

void point(Heads& h, const Tensor& x, Tensor& out) {
  h.x = data(x);
  h.token_stride = x.stride(0), h.head_stride = x.stride(1);
  h.num_heads = x.size(1);
  h.out = out_data(out);
}

void launch(Rope3d& op, const Tensor& like, const Tensor& grids, int64_t num_chunks) {
  Samples samples = Samples::of_grids(grids, op.first + op.num_tokens, true);
  const int64_t heads = op.qk[0].num_heads + op.qk[1].num_heads;
  if (op.num_tokens == 0 || heads == 0 || op.head_dim == 0) return;
  if (runs_on_cpu(like)) {
    const int64_t row = heads * op.head_dim;
    // Whole vectors at aligned places only: 16 numbers are the widest, or as many pairs.
    op.stream = op.num_tokens * row * item_bytes(op.dtype) > STREAM_BYTES &&
                op.head_dim % (op.angles_twice() ? 16 : 32) == 0;
    const void* tables[3];
    std::vector<float> as_float;
    std::vector<double> as_double;
    if (op.dtype == Dtype::f64)
      as_double = fill_tables<double>(op, samples, tables);
    else
      as_float = fill_tables<float>(op, samples, tables);
    const int64_t grain = std::max<int64_t>(1, 65536 / row);  // 64 k elements a thread at least
    const int64_t unit = num_chunks > 0 ? op.chunk : 1;       // a chunk's sum belongs to one thread
    torch::stable::parallel_for(0, (op.num_tokens + unit - 1) / unit, (grain + unit - 1) / unit,
                                [&](int64_t begin, int64_t end) {
                                  cpu().rope3d(&op, tables, samples.host(), samples.size(), begin * unit,
                                               std::min(end * unit, op.num_tokens));
                                });
    return;
  }
#ifdef SORAHPC_CUDA
  STD_TORCH_CHECK(op.dtype != Dtype::f64, "rope3d: float64 is for CPU");
  const OnDevice on(like);
  const int error = sorahpc_rope3d_cuda(&op, samples.host(), samples.size(), samples.device(like), num_chunks,
                                        on.stream);
  STD_TORCH_CHECK(error == 0, "rope3d: CUDA error ", error, " at launch");
#endif
}

Tensor as_compute(const Tensor& weight, const Rope3d& op) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == op.head_dim, "weight: expected [", op.head_dim, "]");
  return torch::stable::contiguous(torch::stable::to(weight, compute_type(op.dtype)));
}

std::tuple<Tensor, Tensor> rope3d(const Tensor& q, const Tensor& k, const Tensor& grids, std::vector<int64_t> axes_dim,
                                  std::vector<double> theta, std::vector<double> offset, std::vector<double> scale,
                                  int64_t first, bool interleaved, bool inverse) {
  Rope3d op = params(q, k, axes_dim, theta, offset, scale, first, interleaved);
  op.inverse = inverse;
  const Tensor q_in = dense_heads(q), k_in = dense_heads(k);
  std::tuple<Tensor, Tensor> out{torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}),
                                 torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)})};
  point(op.qk[0], q_in, std::get<0>(out));
  point(op.qk[1], k_in, std::get<1>(out));
  launch(op, q, grids, 0);
  return out;
}

std::tuple<Tensor, Tensor> qk_norm_rope3d(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                          const Tensor& k_weight, const Tensor& grids, std::vector<int64_t> axes_dim,
                                          std::vector<double> theta, std::vector<double> offset,
                                          std::vector<double> scale, int64_t first, bool interleaved, double eps) {
  Rope3d op = params(q, k, axes_dim, theta, offset, scale, first, interleaved);
  op.eps = eps;
  const Tensor q_in = dense_heads(q), k_in = dense_heads(k);
  const Tensor wq = as_compute(q_weight, op), wk = as_compute(k_weight, op);
  std::tuple<Tensor, Tensor> out{torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}),
                                 torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)})};
  point(op.qk[0], q_in, std::get<0>(out));
  point(op.qk[1], k_in, std::get<1>(out));
  op.qk[0].weight = data<void>(wq), op.qk[1].weight = data<void>(wk);
  launch(op, q, grids, 0);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope3d_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k, const Tensor& q_weight, const Tensor& k_weight,
    const Tensor& grids, std::vector<int64_t> axes_dim, std::vector<double> theta, std::vector<double> offset,
    std::vector<double> scale, int64_t first, bool interleaved, double eps) {
  Rope3d op = params(q, k, axes_dim, theta, offset, scale, first, interleaved);
  op.eps = eps;
  op.inverse = op.backward = true;
  const Tensor* saved[2] = {&q, &k};
  const Tensor* grad[2] = {&dq, &dk};
  const Tensor* weight[2] = {&q_weight, &k_weight};
  // A sum for each chunk first, then one over the chunks: the same for any number of threads. On a GPU a chunk is what
  // a block works through, so that there are a few blocks a multiprocessor; on the CPU it is long enough to be cheap.
  op.chunk = int32_t(runs_on_cpu(q) ? 16 : std::max<int64_t>(4, (op.num_tokens + 1023) / 1024 + 3) / 4 * 4);
  const int64_t num_chunks = (op.num_tokens + op.chunk - 1) / op.chunk;
  std::vector<Tensor> keep, out, sums;
  keep.reserve(6), out.reserve(2), sums.reserve(2);
  for (int i = 0; i < 2; ++i) {
    const Tensor& x = *saved[i];
    STD_TORCH_CHECK(grad[i]->dim() == 3 && grad[i]->size(0) == x.size(0) && grad[i]->size(1) == x.size(1) &&
                        grad[i]->size(2) == x.size(2) && grad[i]->scalar_type() == x.scalar_type() &&
                        grad[i]->get_device_index() == x.get_device_index(),
                    "gradient: expected the shape, dtype and device of the input");
    out.push_back(torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}));
    sums.push_back(torch::stable::new_zeros(x, {num_chunks, x.size(2)}, compute_type(op.dtype)));
    keep.push_back(dense_heads(*grad[i]));
    point(op.qk[i], keep.back(), out.back());
    keep.push_back(dense_heads(x));
    op.qk[i].saved = data(keep.back());
    op.qk[i].saved_token_stride = keep.back().stride(0), op.qk[i].saved_head_stride = keep.back().stride(1);
    keep.push_back(as_compute(*weight[i], op));
    op.qk[i].weight = data<void>(keep.back());
    op.qk[i].dweight = out_data<void>(sums.back());
  }
  launch(op, q, grids, num_chunks);
  const auto total = [&](int i) {
    const int64_t dim = 0;
    return torch::stable::to(torch::stable::sum(sums[i], torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1)),
                             weight[i]->scalar_type());
  };
  return {out[0], out[1], total(0), total(1)};
}

#define HOW \
  "Tensor grids, int[] axes_dim, float[] theta, float[] offset, float[] scale, SymInt first, bool interleaved, "
const Schema schemas[] = {
    Schema("rope3d(Tensor q, Tensor k, " HOW "bool inverse) -> (Tensor, Tensor)"),
    Schema("qk_norm_rope3d(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, " HOW "float eps) -> (Tensor, Tensor)"),
    Schema("qk_norm_rope3d_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, " HOW
           "float eps) -> (Tensor, Tensor, Tensor, Tensor)")};

}  // namespace
}  // namespace sorahpc

#define REGISTER(m)                                                          \
  m.impl("rope3d", TORCH_BOX(&sorahpc::rope3d));                             \
  m.impl("qk_norm_rope3d", TORCH_BOX(&sorahpc::qk_norm_rope3d));             \
  m.impl("qk_norm_rope3d_backward", TORCH_BOX(&sorahpc::qk_norm_rope3d_backward));

STABLE_TORCH_LIBRARY_IMPL(sorahpc, CPU, m) { REGISTER(m) }
#ifdef SORAHPC_CUDA
STABLE_TORCH_LIBRARY_IMPL(sorahpc, CUDA, m) { REGISTER(m) }
#endif
