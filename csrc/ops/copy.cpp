// stream_copy: the machine's limit, beside which the other ops are measured.
#include "common.h"

namespace sorahpc {
namespace {

Tensor stream_copy(const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(x);
  Tensor result = torch::stable::empty_like(dense);
  constexpr int64_t BLOCK = 1 << 16;
  const int64_t bytes = dense.numel() * item_bytes(dtype_of(dense));
  torch::stable::parallel_for(0, (bytes + BLOCK - 1) / BLOCK, 16, [&](int64_t begin, int64_t end) {
    cpu().stream_copy(data(dense) + begin * BLOCK, out_data(result) + begin * BLOCK,
                      std::min(end * BLOCK, bytes) - begin * BLOCK);
  });
  return result;
}

const Schema schema("stream_copy(Tensor x) -> Tensor");

}  // namespace
}  // namespace sorahpc

STABLE_TORCH_LIBRARY_IMPL(sorahpc, CPU, m) { m.impl("stream_copy", TORCH_BOX(&sorahpc::stream_copy)); }
