// A copy past the caches: the fastest that this machine moves bytes, which profile measures the other ops against.
#pragma once

#include "vec.h"

namespace {

// bytes: any; dst at a multiple of 64.
void stream_copy(const char* src, char* dst, int64_t bytes) {
  using V = Vec<float, LANES<float>>;
  int64_t i = 0;
  for (; i + VECTOR_BYTES <= bytes; i += VECTOR_BYTES) {
    V v;
    std::memcpy(&v, src + i, sizeof(V));
    put<true>(dst + i, v);
  }
  std::memcpy(dst + i, src + i, bytes - i);
  stream_fence();
}

}  // namespace
