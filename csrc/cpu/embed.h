// Sinusoidal embeddings on CPU.
#pragma once

#include "../embed.h"
#include "flow_patchify.h"
#include "vec.h"

namespace {

using sorahpc::Sincos3d;

template <typename T, bool ADD, bool STREAM>
void sincos3d_tokens(const Sincos3d& op, const void* const* tables, const Sample* samples, int64_t num_samples,
                     int64_t begin, int64_t end) {
  using C = typename Compute<T>::type;
  const int64_t width = 2 * op.half;
  int64_t s = find_sample(samples, num_samples, op.first + begin);
  int64_t at[3];
  const int64_t i = op.first + begin - samples[s].first_token;
  at[2] = i % samples[s].W, at[1] = i / samples[s].W % samples[s].H, at[0] = i / samples[s].W / samples[s].H;
  for (int64_t token = begin; token < end; ++token) {
    for (int a = 0; a < 3; ++a) {
      const C* row = (const C*)tables[a] + at[a] * width;
      const T* x = (const T*)op.x + token * op.x_stride + a * width;
      T* out = (T*)op.out + (3 * token + a) * width;
      in_vectors<LANES<C>>(width, [&](auto w, int64_t i) __attribute__((always_inline)) {
        constexpr int N = decltype(w)::value;
        if constexpr (ADD)
          store<STREAM, N>(out + i, load<N>(x + i) + load<N>(row + i));
        else
          store<STREAM, N>(out + i, load<N>(row + i));
      });
    }
    if (++at[2] < samples[s].W) continue;
    at[2] = 0;
    if (++at[1] < samples[s].H) continue;
    at[1] = 0;
    if (++at[0] < samples[s].T) continue;
    at[0] = 0;
    ++s;
  }
  if (STREAM) stream_fence();
}

template <typename T>
void sincos3d_typed(const Sincos3d& op, const void* const* tables, const Sample* samples, int64_t n, int64_t begin,
                    int64_t end) {
  if (op.x == nullptr)
    return op.stream ? sincos3d_tokens<T, false, true>(op, tables, samples, n, begin, end)
                     : sincos3d_tokens<T, false, false>(op, tables, samples, n, begin, end);
  return op.stream ? sincos3d_tokens<T, true, true>(op, tables, samples, n, begin, end)
                   : sincos3d_tokens<T, true, false>(op, tables, samples, n, begin, end);
}

void sincos3d(const Sincos3d* op, const void* const* tables, const Sample* samples, int64_t num_samples, int64_t begin,
              int64_t end) {
  switch (op->dtype) {
    case Dtype::f16: return sincos3d_typed<half_t>(*op, tables, samples, num_samples, begin, end);
    case Dtype::bf16: return sincos3d_typed<bf16_t>(*op, tables, samples, num_samples, begin, end);
    case Dtype::f32: return sincos3d_typed<float>(*op, tables, samples, num_samples, begin, end);
    case Dtype::f64: return sincos3d_typed<double>(*op, tables, samples, num_samples, begin, end);
  }
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
