// ada_norm: residual, layer norm and modulation of a ragged pack, forward and backward.
#include "common.h"

namespace sorahpc {
namespace {

#ifdef SORAHPC_CUDA
// -1: a row is too long for this GPU's shared memory.
extern "C" int sorahpc_ada_norm_cuda(const AdaNorm* op, bool backward, const Sample* samples, const Sample* on_device,
                                     void* stream);
#endif

// Points `rows` at `x`: [count, M], M contiguous, rows anywhere. What it points at is kept in `keep`.
void point(const char* name, Rows& rows, const Tensor& x, int64_t count, const Tensor& like,
           std::vector<Tensor>& keep) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == count && x.size(1) == like.size(1), name, ": expected [", count, ", ",
                  like.size(1), "]");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && x.is_cpu() == like.is_cpu() &&
                      x.get_device_index() == like.get_device_index(),
                  name, ": expected the dtype and device of the tokens");
  keep.push_back(x.size(1) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x));
  rows = {data(keep.back()), keep.back().stride(0)};
}

AdaNorm params(const Tensor& x, const Samples& samples, double eps) {
  AdaNorm op{};
  op.num_tokens = x.size(0), op.num_samples = samples.size(), op.M = x.size(1);
  op.eps = eps;
  op.dtype = dtype_of(x);
  return op;
}

Samples samples_of(const Tensor& x, const Tensor& lens) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "x: expected [L, M], M at least 1");
  return Samples::of_lens(lens, x.size(0));
}

Tensor empty_rows(const Tensor& like, int64_t rows) { return torch::stable::new_empty(like, {rows, like.size(1)}); }

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// Results past the caches: `bytes` of them, in rows that are whole cache lines.
bool streams(const AdaNorm& op, int64_t bytes, std::initializer_list<const char*> results) {
  bool aligned = op.M * item_bytes(op.dtype) % 64 == 0;
  for (const char* p : results) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 64 == 0;
  return aligned && bytes > STREAM_BYTES;
}

#ifdef SORAHPC_CUDA
void launch_cuda(const AdaNorm& op, bool backward, Samples& samples, const Tensor& like) {
  STD_TORCH_CHECK(op.dtype != Dtype::f64, "ada_norm: float64 is for CPU");
  const OnDevice on(like);
  const int error = sorahpc_ada_norm_cuda(&op, backward, samples.host(), samples.device(like), on.stream);
  STD_TORCH_CHECK(error != -1, "ada_norm: rows of ", op.M, " numbers need more shared memory than this GPU has");
  STD_TORCH_CHECK(error == 0, "ada_norm: CUDA error ", error, " at launch");
}
#endif

// A thread's own memory for n numbers of what is computed in.
std::vector<Line> numbers(const AdaNorm& op, int64_t n) {
  return std::vector<Line>(n * (op.dtype == Dtype::f64 ? 8 : 4) / sizeof(Line) + 1);
}

int64_t grain_of(const AdaNorm& op) { return std::max<int64_t>(1, 32768 / op.M); }  // 32 k elements a thread at least

std::tuple<Tensor, Tensor, Tensor> ada_norm(const Tensor& x, std::optional<Tensor> branch, std::optional<Tensor> gate,
                                            std::optional<Tensor> shift, std::optional<Tensor> scale,
                                            const Tensor& lens, double eps) {
  STD_TORCH_CHECK(branch || !gate, "gate: given without a branch");
  STD_TORCH_CHECK(!shift == !scale, "shift, scale: expected both or neither");
  Samples samples = samples_of(x, lens);
  AdaNorm op = params(x, samples, eps);
  const int64_t L = op.num_tokens, S = op.num_samples;
  std::vector<Tensor> keep;
  point("x", op.x, x, L, x, keep);
  if (branch) point("branch", op.branch, *branch, L, x, keep);
  if (gate) point("gate", op.gate, *gate, S, x, keep);
  if (scale) {
    point("shift", op.shift, *shift, S, x, keep);
    point("scale", op.scale, *scale, S, x, keep);
  }
  std::tuple<Tensor, Tensor, Tensor> out{branch ? empty_rows(x, L) : nothing(x), empty_rows(x, L),
                                         torch::stable::new_empty(x, {L, 2}, compute_type(op.dtype))};
  if (L == 0) return out;
  if (branch) op.sum = out_data(std::get<0>(out));
  op.y = out_data(std::get<1>(out)), op.moments = out_data<void>(std::get<2>(out));
  if (runs_on_cpu(x)) {
    op.stream = streams(op, (branch ? 2 : 1) * L * op.M * item_bytes(op.dtype), {op.sum, op.y});
    torch::stable::parallel_for(0, L, grain_of(op), [&](int64_t begin, int64_t end) {
      std::vector<Line> scratch = numbers(op, 2 * op.M);
      cpu().ada_norm(&op, samples.host(), begin, end, scratch.data());
    });
    return out;
  }
#ifdef SORAHPC_CUDA
  launch_cuda(op, false, samples, x);
#endif
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ada_norm_backward(
    std::optional<Tensor> dsum, const Tensor& dy, const Tensor& sum, const Tensor& moments,
    std::optional<Tensor> branch, std::optional<Tensor> gate, std::optional<Tensor> scale, const Tensor& lens) {
  STD_TORCH_CHECK(!branch == !gate, "branch, gate: expected both or neither");
  Samples samples = samples_of(sum, lens);
  AdaNorm op = params(sum, samples, 0);
  const int64_t L = op.num_tokens, S = op.num_samples;
  std::vector<Tensor> keep;
  STD_TORCH_CHECK(moments.dim() == 2 && moments.size(0) == L && moments.size(1) == 2 &&
                      moments.scalar_type() == compute_type(op.dtype) && moments.is_cpu() == sum.is_cpu() &&
                      moments.get_device_index() == sum.get_device_index(),
                  "moments: expected [", L, ", 2] as ada_norm gives them");
  keep.push_back(torch::stable::contiguous(moments));
  op.moments = const_cast<void*>(data<void>(keep.back()));
  point("sum", op.x, sum, L, sum, keep);
  point("dy", op.dy, dy, L, sum, keep);
  if (dsum) point("dsum", op.dsum, *dsum, L, sum, keep);
  if (gate) {
    point("branch", op.branch, *branch, L, sum, keep);
    point("gate", op.gate, *gate, S, sum, keep);
  }
  if (scale) point("scale", op.scale, *scale, S, sum, keep);
  // On a GPU a chunk is what a block works through, so that there are a few blocks a multiprocessor; on the CPU it is
  // long enough for all chunks' sums to be a hundredth of the result.
  op.chunk = int32_t(runs_on_cpu(sum) ? 256 : std::min<int64_t>(64, std::max<int64_t>(4, (L + 1023) / 1024)));
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> out{
      empty_rows(sum, L), gate ? empty_rows(sum, L) : nothing(sum), gate ? empty_rows(sum, S) : nothing(sum),
      scale ? empty_rows(sum, S) : nothing(sum), scale ? empty_rows(sum, S) : nothing(sum)};
  op.dx = out_data(std::get<0>(out));
  if (gate) op.dbranch = out_data(std::get<1>(out)), op.dgate = out_data(std::get<2>(out));
  if (scale) op.dshift = out_data(std::get<3>(out)), op.dscale = out_data(std::get<4>(out));
  if (S == 0) return out;
  Tensor partials = torch::stable::new_empty(sum, {op.num_chunks(), op.kinds(), op.M}, compute_type(op.dtype));
  op.partials = out_data<void>(partials);
  if (runs_on_cpu(sum)) {
    op.stream = streams(op, (gate ? 2 : 1) * L * op.M * item_bytes(op.dtype), {op.dx, op.dbranch});
    const int64_t grain = (grain_of(op) + op.chunk - 1) / op.chunk;
    torch::stable::parallel_for(0, op.num_chunks(), grain, [&](int64_t begin, int64_t end) {
      std::vector<Line> scratch = numbers(op, op.kinds() * op.M);
      cpu().ada_norm_backward(&op, samples.host(), begin, end, scratch.data());
    });
    torch::stable::parallel_for(0, S * op.kinds(), grain_of(op), [&](int64_t begin, int64_t end) {
      cpu().ada_norm_sums(&op, samples.host(), begin, end);
    });
    return out;
  }
#ifdef SORAHPC_CUDA
  launch_cuda(op, true, samples, sum);
#endif
  return out;
}

const Schema schemas[] = {
    Schema("ada_norm(Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor lens, float eps)"
           " -> (Tensor, Tensor, Tensor)"),
    Schema("ada_norm_backward(Tensor? dsum, Tensor dy, Tensor sum, Tensor moments, Tensor? branch, Tensor? gate, "
           "Tensor? scale, Tensor lens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")};

}  // namespace
}  // namespace sorahpc

#define REGISTER(m)                                  \
  m.impl("ada_norm", TORCH_BOX(&sorahpc::ada_norm)); \
  m.impl("ada_norm_backward", TORCH_BOX(&sorahpc::ada_norm_backward));

STABLE_TORCH_LIBRARY_IMPL(sorahpc, CPU, m) { REGISTER(m) }
#ifdef SORAHPC_CUDA
STABLE_TORCH_LIBRARY_IMPL(sorahpc, CUDA, m) { REGISTER(m) }
#endif
