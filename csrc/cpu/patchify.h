// patchify on CPU: a row of tokens at a time, so that its W*P elements stay in cache while the C*pt*ph pixel rows that
// feed them are read from start to end. Both directions are one loop with source and destination exchanged.
#pragma once

#include "../patchify.h"
#include "vec.h"

namespace {

// n runs of BYTES each. A constant size turns memcpy into one load and one store; a size known only at run time costs
// a library call a run (2 to 3 times slower at pw = 2).
template <int BYTES>
void copy_runs(char* dst, int64_t dst_stride, const char* src, int64_t src_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, BYTES);
}

void copy_runs(int64_t bytes, char* dst, int64_t dst_stride, const char* src, int64_t src_stride, int64_t n) {
  switch (bytes) {
    case 2: return copy_runs<2>(dst, dst_stride, src, src_stride, n);
    case 4: return copy_runs<4>(dst, dst_stride, src, src_stride, n);
    case 8: return copy_runs<8>(dst, dst_stride, src, src_stride, n);
    case 16: return copy_runs<16>(dst, dst_stride, src, src_stride, n);
    case 32: return copy_runs<32>(dst, dst_stride, src, src_stride, n);
    case 64: return copy_runs<64>(dst, dst_stride, src, src_stride, n);
    default:
      for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, bytes);
  }
}

void patchify_row(const sorahpc::Patchify* op, int item_bytes, bool to_tokens, int64_t T, int64_t H, int64_t W,
                  int64_t row, char* latent, char* tokens) {
  const int64_t t = row / H, h = row % H;
  const int64_t token_bytes = op->token_size() * item_bytes;
  // What is contiguous on both sides: pw pixels, or a single one where the channels come last.
  const int64_t run = op->channels_last ? 1 : op->pw;
  char* const first = tokens + row * W * token_bytes;
  for (int64_t c = 0; c < op->channels; ++c)
    for (int64_t it = 0; it < op->pt; ++it)
      for (int64_t ih = 0; ih < op->ph; ++ih) {
        char* const pixels = latent + op->row_in_latent(T, H, W, c, t * op->pt + it, h * op->ph + ih) * item_bytes;
        for (int64_t iw = 0; iw < op->pw; iw += run) {
          char* const a = pixels + iw * item_bytes;
          char* const b = first + op->in_token(c, it, ih, iw) * item_bytes;
          if (to_tokens)
            copy_runs(run * item_bytes, b, token_bytes, a, op->pw * item_bytes, W);
          else
            copy_runs(run * item_bytes, a, op->pw * item_bytes, b, token_bytes, W);
        }
      }
}

}  // namespace
