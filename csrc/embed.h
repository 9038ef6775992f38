// Sinusoidal embeddings: of 3D positions, and of timesteps. What CPU and CUDA share. No torch types.
#pragma once

#include "pack.h"

namespace sorahpc {

// Columns of a token: for each of T, H, W `half` sines and `half` cosines of index * theta^(-i / half).
struct Sincos3d {
  const char* x;     // [num_tokens, 6 half] to add to; null: the embedding itself is written
  char* out;         // dense
  int64_t x_stride;  // elements a token of x
  Dtype dtype;
  int64_t first, num_tokens;  // tokens [first, first + num_tokens) of the pack
  int32_t half;
  double theta;
  bool stream;  // CPU: the result is larger than the caches
};

// [S, 2 half]: cosines, then sines, of scale * t * frequency, each product rounded to what is computed in.
struct Timesteps {
  const void* t;           // float, or double
  void* out;               // of the same type
  const void* frequencies;  // [half], of the same type
  int64_t num_t, half;
  double scale;
};

}  // namespace sorahpc
