// A copy past the caches: the fastest that this machine moves bytes. Ops write with it what they put together in memory
// of their own, and profile measures them against it.
#pragma once

#include "vec.h"

namespace {

// n bytes; what is less than a line at either end of `to` goes through the caches.
void copy_out(char* to, const char* from, int64_t n) {
  using V = Vec<float, LANES<float>>;
  const int64_t head = int64_t(-uintptr_t(to) % 64);
  int64_t i = head < n ? head : n;
  std::memcpy(to, from, i);
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 64; j += VECTOR_BYTES) {
      V v;
      std::memcpy(&v, from + i + j, sizeof(V));
      put<true>(to + i + j, v);
    }
  std::memcpy(to + i, from + i, n - i);
}

void stream_copy(const char* src, char* dst, int64_t bytes) {
  copy_out(dst, src, bytes);
  stream_fence();
}

}  // namespace
