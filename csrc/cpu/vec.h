// Vectors of the width that this build of the kernels is for: setup.py compiles kernels.cpp once for each of x86-64's
// levels, and ops/ takes the best that the machine has. GCC's vector extensions, so one text serves all; intrinsics only
// where C++ has no word: non-temporal stores, and conversions that compilers don't find.
//
// Everything here and in the kernels has internal linkage, and nothing is taken from the standard library: an inline
// function compiled for AVX-512 in one object would else be the one that the linker keeps for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../pack.h"

#define SORAHPC_INLINE inline __attribute__((always_inline))

namespace {

using sorahpc::Dtype;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

struct half_t {
  uint16_t bits;
};
struct bf16_t {
  uint16_t bits;
};

// What T is computed in.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// A number as a type, for a function to take.
template <int N>
struct width {
  static constexpr int value = N;
};

// f(a number of the dtype)
template <typename F>
void with_number(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f16: return f(half_t{});
    case Dtype::bf16: return f(bf16_t{});
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
  }
}

// f(a number of the dtype, width<1>{} where results go past the caches, else width<0>{}). float64 is there to check
// gradients and never goes past: a kernel more costs every build, and this one nobody would miss.
template <typename F>
void with_number_and_stream(Dtype dtype, bool stream, F&& f) {
  with_number(dtype, [&](auto x) {
    if constexpr (sizeof(x) < 8)
      if (stream) return f(x, width<1>{});
    return f(x, width<0>{});
  });
}

template <typename C, int N>
struct VecOf {
  typedef C type __attribute__((vector_size(N * sizeof(C))));
};
template <typename C, int N>
using Vec = typename VecOf<C, N>::type;

template <typename C>
constexpr int LANES = VECTOR_BYTES / sizeof(C);

template <typename V, typename X>
SORAHPC_INLINE V bits_as(X x) {
  static_assert(sizeof(V) == sizeof(X));
  V v;
  std::memcpy(&v, &x, sizeof(V));
  return v;
}

template <typename C, int N>
SORAHPC_INLINE Vec<C, N> splat(C x) {
  return x - Vec<C, N>{};
}

// n consecutive numbers -> a vector of what they are computed in.
template <int N>
SORAHPC_INLINE Vec<float, N> load(const float* p) {
  Vec<float, N> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int N>
SORAHPC_INLINE Vec<double, N> load(const double* p) {
  Vec<double, N> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <int N>
SORAHPC_INLINE Vec<uint32_t, N> load_bits(const void* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return (Vec<uint32_t, 16>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return (Vec<uint32_t, 8>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#endif
  Vec<uint16_t, N> v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vec<uint32_t, N>);
}

template <int N>
SORAHPC_INLINE Vec<float, N> load(const bf16_t* p) {
  return bits_as<Vec<float, N>>(load_bits<N>(p) << 16);
}

template <int N>
SORAHPC_INLINE Vec<float, N> load(const half_t* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return (Vec<float, 16>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return (Vec<float, 8>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  // Exponent and fraction moved to their places, the bias mended by a multiplication, which makes subnormals right too.
  const Vec<uint32_t, N> u = load_bits<N>(p), sign = (u & 0x8000u) << 16, rest = (u & 0x7fffu) << 13;
  const Vec<float, N> scaled = bits_as<Vec<float, N>>(rest) * 0x1p112f;
  const auto special = rest >= (0x7c00u << 13);  // infinities and NaN
  const Vec<uint32_t, N> bits = special ? rest | 0x7f800000u : bits_as<Vec<uint32_t, N>>(scaled);
  return bits_as<Vec<float, N>>(bits | sign);
}

// Stores; STREAM: past the caches, for results larger than they are (p then aligned to the vector's bytes, or 16).
template <bool STREAM, typename V>
SORAHPC_INLINE void put(void* p, V v) {
#if defined(__x86_64__)
  if constexpr (STREAM && sizeof(V) % 16 == 0) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, bits_as<__m512i>(v));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, bits_as<__m256i>(v));
#endif
    __m128i part[sizeof(V) / 16];
    std::memcpy(part, &v, sizeof(V));
    for (unsigned i = 0; i < sizeof(V) / 16; ++i) _mm_stream_si128((__m128i*)p + i, part[i]);
    return;
  }
#endif
  std::memcpy(p, &v, sizeof(V));
}

template <bool STREAM, int N>
SORAHPC_INLINE void store(float* p, Vec<float, N> v) {
  put<STREAM>(p, v);
}

template <bool STREAM, int N>
SORAHPC_INLINE void store(double* p, Vec<double, N> v) {
  put<STREAM>(p, v);
}

// Added to a float32's bits, it makes their upper half the nearest bfloat16, ties to even. A NaN would lose itself if its
// lower half is not 0.
template <int N>
SORAHPC_INLINE Vec<uint32_t, N> rounding_of(Vec<uint32_t, N> u) {
  return ((u >> 16) & 1u) + 0x7fffu;
}

// v is a result of arithmetic, whose NaN are quiet: their upper halves are NaN.
template <bool STREAM, int N>
SORAHPC_INLINE void store(bf16_t* p, Vec<float, N> v) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) return put<STREAM>(p, bits_as<__m256i>(_mm512_cvtneps_pbh((__m512)v)));
#endif
  using U = Vec<uint32_t, N>;
  const U u = bits_as<U>(v), rounded = u + (v == v ? rounding_of<N>(u) : U{});
#if defined(__AVX512F__)
  if constexpr (N == 16) return put<STREAM>(p, _mm512_cvtepi32_epi16((__m512i)(rounded >> 16)));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i halves = _mm256_shuffle_epi8((__m256i)rounded, _mm256_set1_epi64x(0x0f0e0b0a07060302));
    return put<STREAM>(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08)));
  }
#endif
  put<STREAM>(p, __builtin_convertvector(rounded >> 16, Vec<uint16_t, N>));
}

template <bool STREAM, int N>
SORAHPC_INLINE void store(half_t* p, Vec<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16)
    return put<STREAM>(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
#if defined(__F16C__)
  if constexpr (N == 8)
    return put<STREAM>(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  using U = Vec<uint32_t, N>;
  const U u = bits_as<U>(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  // Subnormal halves: adding 0.5 lets the float adder round at their last bit.
  const U small = bits_as<U>(bits_as<Vec<float, N>>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U out = magnitude < 0x38800000u ? small : normal;
  out = magnitude >= 0x477ff000u ? splat<uint32_t, N>(0x7c00u) : out;  // rounds to infinity
  out = magnitude > 0x7f800000u ? splat<uint32_t, N>(0x7e00u) : out;
  put<STREAM>(p, __builtin_convertvector(out | sign, Vec<uint16_t, N>));
}

template <typename C, int N>
SORAHPC_INLINE C sum(Vec<C, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vec<C, N / 2> a, b;
    std::memcpy(&a, &v, sizeof(a));
    std::memcpy(&b, (const char*)&v + sizeof(a), sizeof(b));
    return sum<C, N / 2>(a + b);
  }
}

// x0 x1 x2 x3 ... -> x1 x0 x3 x2 ...
template <typename C, int N>
SORAHPC_INLINE Vec<C, N> swap_pairs(Vec<C, N> v) {
  if constexpr (N == 2)
    return __builtin_shufflevector(v, v, 1, 0);
  else if constexpr (N == 4)
    return __builtin_shufflevector(v, v, 1, 0, 3, 2);
  else if constexpr (N == 8)
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  else
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

// a0 b0 a1 b1 ...: the first half, and the second. They may be a and b.
template <typename C, int N>
SORAHPC_INLINE void interleave(Vec<C, N> a, Vec<C, N> b, Vec<C, N>& first, Vec<C, N>& second) {
  if constexpr (N == 1) {
    first = a;
    second = b;
  } else if constexpr (N == 2) {
    first = __builtin_shufflevector(a, b, 0, 2);
    second = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (N == 4) {
    first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else if constexpr (N == 8) {
    first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    second = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    first = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// N pairs, their first numbers and their second ones apart.
template <typename C, int N>
struct Pairs {
  Vec<C, N> a, b;

  SORAHPC_INLINE Pairs operator*(C by) const { return {a * by, b * by}; }
  SORAHPC_INLINE Pairs operator*(const Pairs& by) const { return {a * by.a, b * by.b}; }
};

// Of pairs that lie one after the other. In bfloat16 they come apart for nothing: either half of 32 bits becomes a
// float32 by itself, and no number moves across the vector, neither here nor on the way back.
template <int N>
SORAHPC_INLINE Pairs<float, N> load_pairs(const bf16_t* p) {
  Vec<uint32_t, N> u;
  std::memcpy(&u, p, sizeof(u));
  return {bits_as<Vec<float, N>>(u << 16), bits_as<Vec<float, N>>(u & 0xffff0000u)};
}

template <bool STREAM, int N>
SORAHPC_INLINE void store_pairs(float* p, Pairs<float, N> x) {
  Vec<float, N> first, second;
  interleave<float, N>(x.a, x.b, first, second);
  store<STREAM, N>(p, first);
  store<STREAM, N>(p + N, second);
}

// NaN must have a lower half of 0, as those have that arithmetic on bfloat16s gives: a look at each number would take
// rope3d a twentieth of its time.
template <bool STREAM, int N>
SORAHPC_INLINE void store_pairs(bf16_t* p, Pairs<float, N> x) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) {
    const auto h = bits_as<Vec<uint16_t, 32>>(_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a));
    return put<STREAM>(p, __builtin_shufflevector(h, h, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24,
                                                  9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  }
  if constexpr (N == 8) {  // 16 numbers, which store too gives to the instruction; it makes 0 of subnormals
    const auto h = bits_as<Vec<uint16_t, 16>>(_mm256_cvtne2ps_pbh((__m256)x.b, (__m256)x.a));
    return put<STREAM>(p, __builtin_shufflevector(h, h, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  }
#endif
  using U = Vec<uint32_t, N>;
  const U u = bits_as<U>(x.a), v = bits_as<U>(x.b);
  const U a = (u + rounding_of<N>(u)) >> 16, b = v + rounding_of<N>(v);
#if defined(__AVX2__)
  if constexpr (N == 8) return put<STREAM>(p, _mm256_blend_epi16((__m256i)a, (__m256i)b, 0xaa));
#endif
  put<STREAM>(p, a | (b & 0xffff0000u));
}

// Calls f(width<N>, i) over [0, n) in vectors of N, and what is left in halves of that, down to LAST; or, with a NEXT of
// 1, one by one: for rows so long that their rest doesn't matter, the loops in between are only time to compile.
template <int N, int LAST = 1, int NEXT = N / 2, typename F>
SORAHPC_INLINE void in_vectors(int64_t n, F&& f, int64_t i = 0) {
  for (; i + N <= n; i += N) f(width<N>{}, i);
  if constexpr (N > LAST)
    if (i < n) in_vectors<NEXT, LAST>(n, f, i);
}

// f(width<0>), ... f(width<N - 1>): a loop whose index is a constant, so that an array of vectors stays in registers.
template <int N, typename F>
SORAHPC_INLINE void unrolled(F&& f) {
  if constexpr (N > 1) unrolled<N - 1>(f);
  f(width<N - 1>{});
}

// Asks for what will be read some iterations on, into the second cache: a loop of many loads and stores can't itself
// look far enough ahead to keep memory busy.
SORAHPC_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// With 2 kB add_sincos3d takes half as long again in bfloat16; with 16 nothing is faster.
SORAHPC_INLINE const void* ahead(const void* p) { return (const char*)p + 8192; }

// Weakly ordered stores are done before another thread may look.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
