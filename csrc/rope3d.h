// rope3d, and with the RMS norm of q and k in front: what CPU and CUDA share. No torch types.
//
// Pair i of a head belongs to one axis (T, H or W), and turns by position[axis] * frequency[i], with
// position = index * scale[axis] + offset[axis]. Interleaved pairs are (2i, 2i+1), others (i, i + D/2).
#pragma once

#include "pack.h"

namespace sorahpc {

constexpr int MAX_HEAD_DIM = 256;

// One of q and k: [L, heads, D], D contiguous. Strides count elements.
struct Heads {
  const char* x;      // q; in a backward pass its gradient
  const char* saved;  // backward of the norm: what went in
  char* out;
  const void* weight;  // [D] of the RMS norm, in what is computed in; null: no norm
  void* dweight;       // backward of the norm: [num_chunks, D], a sum for each chunk of tokens
  int64_t num_heads;
  int64_t token_stride, head_stride, saved_token_stride, saved_head_stride;
};

struct Rope3d {
  Heads qk[2];
  Dtype dtype;
  int64_t first, num_tokens;  // tokens [first, first + num_tokens) of the pack are rotated
  int32_t head_dim;
  int32_t axis_end[3];  // pairs of T are [0, axis_end[0]), of H [axis_end[0], axis_end[1]), of W the rest
  double theta[3], offset[3], scale[3];
  double eps;
  int32_t chunk;  // backward of the norm: tokens a chunk
  bool interleaved, inverse;
  bool backward;  // of the norm; without a norm the gradient is the inverse
  bool stream;  // CPU: the result is larger than the caches

  // CPU: whether a loop takes pairs as they lie, and reads an angle for each of their numbers; else an angle a pair.
  bool angles_twice() const { return interleaved && dtype != Dtype::bf16; }
};

}  // namespace sorahpc
