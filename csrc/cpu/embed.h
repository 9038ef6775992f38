// Sinusoidal embeddings on CPU.
#pragma once

#include "../embed.h"
#include "flow_patchify.h"
#include "vec.h"

namespace {

using sorahpc::Sincos3d;
using sorahpc::Walk;

template <typename T, bool ADD, bool STREAM>
void sincos3d_tokens(const Sincos3d& op, const void* table, const Sample* samples, int64_t num_samples, int64_t begin,
                     int64_t end) {
  using C = typename Compute<T>::type;
  const int64_t width = 2 * op.half;
  Walk walk(samples, num_samples, op.first + begin);
  for (int64_t token = begin; token < end; ++token, walk.next()) {
    const int32_t at[] = {walk.t, walk.h, walk.w};
    for (int a = 0; a < 3; ++a) {
      const C* row = (const C*)table + at[a] * width;
      const T* x = (const T*)op.x + token * op.x_stride + a * width;
      T* out = (T*)op.out + (3 * token + a) * width;
      in_vectors<LANES<C>>(width, [&](auto w, int64_t i) __attribute__((always_inline)) {
        constexpr int N = decltype(w)::value;
        if constexpr (ADD) {
          prefetch(ahead(x + i));
          store<STREAM, N>(out + i, load<N>(x + i) + load<N>(row + i));
        } else {
          store<STREAM, N>(out + i, load<N>(row + i));
        }
      });
    }
  }
  if (STREAM) stream_fence();
}

void sincos3d(const Sincos3d* op, const void* table, const Sample* samples, int64_t num_samples, int64_t begin,
              int64_t end) {
  with_number_and_stream(op->dtype, op->stream, [&](auto x, auto stream) {
    using T = decltype(x);
    constexpr bool STREAM = decltype(stream)::value;
    return op->x != nullptr ? sincos3d_tokens<T, true, STREAM>(*op, table, samples, num_samples, begin, end)
                            : sincos3d_tokens<T, false, STREAM>(*op, table, samples, num_samples, begin, end);
  });
}

// Timesteps [begin, end).
void timesteps(const sorahpc::Timesteps* op, bool as_double, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (as_double) {
      const double at = op->scale * ((const double*)op->t)[i];
      double* cos = (double*)op->out + 2 * i * op->half;
      for (int64_t j = 0; j < op->half; ++j) {
        const double angle = at * ((const double*)op->frequencies)[j];
        cos[j] = __builtin_cos(angle), cos[op->half + j] = __builtin_sin(angle);
      }
    } else {
      const float at = float(op->scale) * ((const float*)op->t)[i];
      float* cos = (float*)op->out + 2 * i * op->half;
      in_vectors<LANES<double>>(op->half, [&](auto w, int64_t j) __attribute__((always_inline)) {
        constexpr int N = decltype(w)::value;
        using M = Machine<float, N>;
        // In quarters of the circle, reduced in double: exact enough for any angle a float can name below 2^40.
        const Vec<float, N> angle = at * load<N>((const float*)op->frequencies + j);
        const Vec<double, N> quarters = __builtin_convertvector(angle, Vec<double, N>) * 0.6366197723675814;
        const Vec<double, N> magic = quarters + 0x1.8p52, q = magic - 0x1.8p52;
        const Vec<float, N> x = __builtin_convertvector(quarters - q, Vec<float, N>), z = x * x;
        const Vec<uint32_t, N> n = __builtin_convertvector(bits_as<Vec<uint64_t, N>>(magic), Vec<uint32_t, N>);
        using U = Vec<uint32_t, N>;
        const U s = bits_as<U>(x * sorahpc::polynomial<M>(z, sorahpc::SIN_OF_QUARTERS));
        const U c = bits_as<U>(sorahpc::polynomial<M>(z, sorahpc::COS_OF_QUARTERS));
        const auto odd = (n & 1u) != 0u;
        store<false, N>(cos + j, bits_as<Vec<float, N>>((odd ? s : c) ^ (((n + 1u) << 30) & 0x80000000u)));
        store<false, N>(cos + op->half + j, bits_as<Vec<float, N>>((odd ? c : s) ^ ((n << 30) & 0x80000000u)));
      });
    }
  }
}

}  // namespace
