// What every kernel shares: number types, and the table of a ragged pack's samples. No torch types.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SORAHPC_HD __host__ __device__ __forceinline__
#else
// Always: see cpu/vec.h about what the linker would else do.
#define SORAHPC_HD inline __attribute__((always_inline))
#endif

namespace sorahpc {

enum class Dtype : int { f16, bf16, f32, f64 };

// x / y of a count x and a positive y; in 32 bits where both fit, which on a GPU takes a fraction of the time.
SORAHPC_HD int64_t quotient(int64_t x, int64_t y) {
  return uint64_t(x | y) >> 32 == 0 ? int64_t(uint32_t(x) / uint32_t(y)) : x / y;
}

// x % n, and x becomes x / n: the last digit of a number whose digits have places of their own.
SORAHPC_HD int64_t take_digit(int64_t& x, int64_t n) {
  const int64_t q = quotient(x, n), digit = x - q * n;
  x = q;
  return digit;
}

// Samples lie in a pack one after the other; a table of them ends with one more entry, whose first_token is the total.
struct Sample {
  int64_t first_token;
  int32_t T, H, W;  // grid; of a pack of bare lengths T = H = 1
};

// A kernel's arguments hold a table of so many, within the 4 kB that every driver takes; a larger one is copied over.
constexpr int MAX_SAMPLES_IN_ARGUMENTS = 140;

// The sample that holds `token`: the last i < num_samples with first_token <= token, so never an empty one.
SORAHPC_HD int64_t find_sample(const Sample* samples, int64_t num_samples, int64_t token) {
  int64_t low = 0, high = num_samples;
  while (high - low > 1) {
    const int64_t mid = (low + high) / 2;
    if (samples[mid].first_token <= token)
      low = mid;
    else
      high = mid;
  }
  return low;
}

// A walk over a pack's tokens, one by one from `token` on, with the place of each in its sample's grid.
struct Walk {
  const Sample* sample;
  int32_t t, h, w;

  SORAHPC_HD Walk(const Sample* samples, int64_t num_samples, int64_t token)
      : sample(samples + find_sample(samples, num_samples, token)) {
    const int64_t i = token - sample->first_token, row = i / sample->W;
    w = int32_t(i - row * sample->W), h = int32_t(row % sample->H), t = int32_t(row / sample->H);
  }

  // From the pack's last token at most one step, to the table's last entry.
  SORAHPC_HD void next() {
    if (++w < sample->W) return;
    w = 0;
    if (++h < sample->H) return;
    h = 0;
    if (++t < sample->T) return;
    t = 0;
    ++sample;
  }
};

}  // namespace sorahpc
