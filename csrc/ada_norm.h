// ada_norm: residual, layer norm and modulation of a ragged pack, forward and backward: what CPU and CUDA share.
// No torch types.
//
//   sum = x + gate[s] * branch    y = (sum - mean) / sqrt(var + eps) * (1 + scale[s]) + shift[s]
//
// with s the sample of a token. The norm is of `sum` as it is stored, so the gradient, which reads that, is exact to it.
//
// mean and 1 / sqrt(var + eps) of each row are kept for the gradient, which can then begin with a row's sums.
//
// dgate, dshift and dscale are sums over a sample's tokens: first over chunks of `chunk` tokens, counted from the first
// of each sample, then over a sample's chunks in order. Neither depends on how the work is shared out.
#pragma once

#include "pack.h"

namespace sorahpc {

// Rows of M contiguous numbers; the stride counts elements. p is null for what is not given.
struct Rows {
  const char* p;
  int64_t stride;
};

struct AdaNorm {
  Rows x;                         // [L, M]; in the backward pass `sum`, or x where there was no branch
  Rows branch, dsum, dy;          // [L, M]
  Rows gate, shift, scale;        // [S, M]
  char *sum, *y, *dx, *dbranch;   // [L, M] contiguous; null: not wanted
  char *dgate, *dshift, *dscale;  // [S, M] contiguous; null: not wanted
  void* moments;                  // [L, 2] in what is computed in: a row's mean and inverse deviation
  void* partials;                 // [num_chunks, kinds, M] in what is computed in
  int64_t num_tokens, num_samples, M;
  double eps;
  int32_t chunk;
  Dtype dtype;
  bool stream;  // CPU: the result is larger than the caches

  // A chunk's sums: dgate's, then dshift's and dscale's, those of them that are wanted.
  SORAHPC_HD int kinds() const { return (dgate != nullptr ? 1 : 0) + (dshift != nullptr ? 2 : 0); }
  SORAHPC_HD char* sum_of(int kind) const {
    if (dgate == nullptr) ++kind;
    return kind == 0 ? dgate : kind == 1 ? dshift : dscale;
  }

  // Chunks are numbered without a table: a sample's first is one after the most that those before it can fill, so some
  // numbers have no tokens.
  SORAHPC_HD int64_t first_chunk(const Sample* samples, int64_t s) const {
    return samples[s].first_token / chunk + s;
  }
  SORAHPC_HD int64_t num_chunks() const { return num_tokens / chunk + num_samples; }
  // The sample that a chunk's number belongs to; its tokens [begin, end), none if begin >= end.
  SORAHPC_HD int64_t tokens_of_chunk(const Sample* samples, int64_t id, int64_t* begin, int64_t* end) const {
    int64_t low = 0, high = num_samples;
    while (high - low > 1) {
      const int64_t mid = (low + high) / 2;
      if (first_chunk(samples, mid) <= id)
        low = mid;
      else
        high = mid;
    }
    *begin = samples[low].first_token + (id - first_chunk(samples, low)) * chunk;
    *end = *begin + chunk < samples[low + 1].first_token ? *begin + chunk : samples[low + 1].first_token;
    return low;
  }
};

}  // namespace sorahpc
