// flow_patchify on CPU: pieces of rows, a few hundred pixels that are contiguous in the latent, get their noise, are
// mixed in buffers that stay in the first cache, and are then spread over their tokens as patchify does.
#pragma once

#include "../flow_patchify.h"
#include "patchify.h"
#include "vec.h"

namespace {

using sorahpc::Sample;

// A product that is rounded before it is used: GCC fuses a * b + c where the machine can, and bits would then depend on
// the machine.
template <typename X>
SORAHPC_INLINE X opaque(X x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <typename C, int N>
SORAHPC_INLINE Vec<C, N> rounded(Vec<C, N> x) {
  if constexpr (N == 1)
    return Vec<C, 1>{opaque(x[0])};  // no register class holds a vector of one
  else
    return opaque(x);
}

template <int N>
SORAHPC_INLINE Vec<float, N> square_root(Vec<float, N> x) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return (Vec<float, 16>)_mm512_sqrt_ps((__m512)x);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return (Vec<float, 8>)_mm256_sqrt_ps((__m256)x);
#endif
#if defined(__x86_64__)
  if constexpr (N == 4) return (Vec<float, 4>)_mm_sqrt_ps((__m128)x);
#endif
  for (int i = 0; i < N; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// The machine of ../random.h: N numbers of C, N / 2 blocks.
template <typename C, int N>
struct Machine {
  using F = Vec<C, N>;
  using U = Vec<uint32_t, N>;
  using I = Vec<int32_t, N>;
  using W = Vec<uint64_t, (N + 1) / 2>;

  static SORAHPC_INLINE F f(C x) { return splat<C, N>(x); }
  static SORAHPC_INLINE W w(uint64_t x) { return splat<uint64_t, (N + 1) / 2>(x); }
  static SORAHPC_INLINE F add(F a, F b) { return a + b; }
  static SORAHPC_INLINE F mul(F a, F b) { return rounded<C, N>(a * b); }
  static SORAHPC_INLINE F root(F x) { return square_root<N>(x); }
  static SORAHPC_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
  template <typename V, typename X>
  static SORAHPC_INLINE V bits_as(X x) {
    return ::bits_as<V>(x);
  }
  template <typename Mask>
  static SORAHPC_INLINE U select(Mask where, U a, U b) {
    return where ? a : b;
  }
  // GCC has no word for the product of two low halves, and would multiply all 64 bits.
  static SORAHPC_INLINE W wide(W a, uint32_t b) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return (W)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#endif
#if defined(__AVX2__)
    if constexpr (N == 8) return (W)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#endif
#if defined(__x86_64__)
    if constexpr (N == 4) return (W)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#endif
    return (a & uint64_t(0xffffffffu)) * uint64_t(b);
  }
};

constexpr int NORMALS_AT_ONCE = 2 * LANES<float>;

// The normals of blocks [block, ...) until there are n; what comes out is whole vectors, NORMALS_AT_ONCE - 1 more at
// most. Not inline: the round's keys are then read from memory as operands, where moving them from integer registers
// would be a sixth of all instructions.
__attribute__((noinline)) void fill_normals(const sorahpc::Stream& stream, int64_t block, int64_t n, float* out) {
  constexpr int N = LANES<float>;
  using M = Machine<float, N>;
  typename M::W lane{};
  for (int i = 0; i < N / 2; ++i) lane[i] = uint64_t(i);
  for (int64_t i = 0; i < n; i += NORMALS_AT_ONCE) {
    typename M::W c[4];
    stream.words<M>(lane + uint64_t(block + i / 4), c);
    // Pairs (0, 1) and (2, 3) of the blocks' words, side by side.
    const uint64_t low = 0xffffffffu;
    const auto a = bits_as<typename M::U>((c[0] & low) | (c[2] << 32));
    const auto b = bits_as<typename M::U>((c[1] & low) | (c[3] << 32));
    typename M::F with_cos, with_sin, first, second;
    sorahpc::normals<M>(a, b, with_cos, with_sin);
    interleave<float, N>(with_cos, with_sin, first, second);
    store<false, N>(out + i, first);
    store<false, N>(out + i + N, second);
  }
}

// n runs of BYTES from each of a and b, one behind the other.
template <int BYTES>
void copy_two_runs(char* dst, int64_t dst_stride, const char* a, const char* b, int64_t src_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i, dst += dst_stride, a += src_stride, b += src_stride) {
    char both[2 * BYTES];
    std::memcpy(both, a, BYTES);
    std::memcpy(both + BYTES, b, BYTES);
    std::memcpy(dst, both, 2 * BYTES);
  }
}

void copy_two_runs(int64_t bytes, char* dst, int64_t dst_stride, const char* a, const char* b, int64_t src_stride,
                   int64_t n) {
  switch (bytes) {
    case 4: return copy_two_runs<4>(dst, dst_stride, a, b, src_stride, n);
    case 8: return copy_two_runs<8>(dst, dst_stride, a, b, src_stride, n);
    default:
      copy_runs(bytes, dst, dst_stride, a, src_stride, n);
      copy_runs(bytes, dst + bytes, dst_stride, b, src_stride, n);
  }
}

constexpr int64_t PIECE = 1 << 12;  // pixels; at least a patch's width

template <typename T, sorahpc::Target TARGET>
SORAHPC_INLINE void mix(float t, const T* x0, const float* noise, int64_t n, T* noised, T* learned) {
  using C = typename Compute<T>::type;
  in_vectors<LANES<C>>(n, [&](auto w, int64_t i) __attribute__((always_inline)) {
    constexpr int N = decltype(w)::value;
    Vec<C, N> eps;
    if constexpr (sizeof(C) == sizeof(float))
      eps = load<N>(noise + i);
    else
      eps = __builtin_convertvector(load<N>(noise + i), Vec<C, N>);
    Vec<C, N> a, b;
    sorahpc::flow<Machine<C, N>, C>(TARGET, C(t), load<N>(x0 + i), eps, a, b);
    store<false, N>(noised + i, a);
    store<false, N>(learned + i, b);
  });
}

// Pixels of `rows` pixel rows from (c, it) of the token rows from (t, h) on: `width` of each, from token w0 on. Only
// one row where that is not all of it.
template <typename T>
void flow_piece(const sorahpc::FlowPatchify& op, const sorahpc::Stream& stream, float t, const Sample& s, int64_t c,
                int64_t frame, int64_t y0, int64_t rows, int64_t w0, int64_t tokens_wide, const T* latent, T* tokens,
                T* target) {
  using sorahpc::Target;
  alignas(64) float noise[PIECE + 4 + NORMALS_AT_ONCE];
  alignas(64) T buffer[2][PIECE];
  const sorahpc::Patchify& p = op.patch;
  const int64_t width = tokens_wide * p.pw, n = rows * width;
  const int64_t e = p.row_in_latent(s.T, s.H, s.W, c, frame, y0) + w0 * p.pw;
  fill_normals(stream, e / 4, n + e % 4, noise);
  const float* eps = noise + e % 4;
  switch (op.target) {
    case Target::velocity: mix<T, Target::velocity>(t, latent + e, eps, n, buffer[0], buffer[1]); break;
    case Target::eps: mix<T, Target::eps>(t, latent + e, eps, n, buffer[0], buffer[1]); break;
    case Target::v: mix<T, Target::v>(t, latent + e, eps, n, buffer[0], buffer[1]); break;
  }
  const int64_t P = p.token_size(), run = p.channels_last ? 1 : p.pw;
  // Two rows of a patch lie side by side in its tokens: so many at once, for half the stores.
  const int64_t together = p.channels_last || p.ph % 2 != 0 || rows % 2 != 0 ? 1 : 2;
  for (int64_t r = 0; r < rows; r += together) {
    const int64_t y = y0 + r;
    const int64_t first = ((frame / p.pt * s.H + y / p.ph) * s.W + w0) * P;
    for (int64_t iw = 0; iw < p.pw; iw += run) {
      const int64_t to = first + p.in_token(c, frame % p.pt, y % p.ph, iw);
      for (int which = 0; which < 2; ++which) {
        char* const dst = (char*)((which ? target : tokens) + to);
        const char* const src = (const char*)(buffer[which] + r * width + iw);
        const int64_t dst_stride = P * sizeof(T), src_stride = p.pw * sizeof(T);
        if (together == 2)
          copy_two_runs(run * sizeof(T), dst, dst_stride, src, src + width * sizeof(T), src_stride, tokens_wide);
        else
          copy_runs(run * sizeof(T), dst, dst_stride, src, src_stride, tokens_wide);
      }
    }
  }
}

template <typename T>
void flow_rows(const sorahpc::FlowPatchify& op, const sorahpc::Draw& draw, const Sample& s, int64_t t, int64_t h0,
               int64_t h1, const T* latent, T* tokens, T* target, T* scratch) {
  const sorahpc::Patchify& p = op.patch;
  const sorahpc::Stream stream = op.stream(draw);
  const int64_t width = s.W * p.pw, y1 = h1 * p.ph;
  // The tokens of these rows are contiguous: they are put together in the scratch memory, and then written in order.
  const int64_t first = (t * s.H + h0) * s.W * p.token_size(), n = (h1 - h0) * s.W * p.token_size();
  T* const a = scratch != nullptr ? scratch - first : tokens;
  T* const b = scratch != nullptr ? scratch + n - first : target;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t frame = t * p.pt; frame < (t + 1) * p.pt; ++frame)
      if (width <= PIECE) {
        const int64_t most = width <= PIECE / 2 ? PIECE / width / 2 * 2 : 1;
        for (int64_t y = h0 * p.ph; y < y1; y += most)
          flow_piece<T>(op, stream, draw.t, s, c, frame, y, y1 - y < most ? y1 - y : most, 0, s.W, latent, a, b);
      } else {
        const int64_t most = PIECE / p.pw;
        for (int64_t y = h0 * p.ph; y < y1; ++y)
          for (int64_t w = 0; w < s.W; w += most)
            flow_piece<T>(op, stream, draw.t, s, c, frame, y, 1, w, s.W - w < most ? s.W - w : most, latent, a, b);
      }
  if (scratch == nullptr) return;
  copy_out((char*)(tokens + first), (const char*)scratch, n * sizeof(T));
  copy_out((char*)(target + first), (const char*)(scratch + n), n * sizeof(T));
}

void flow_patchify(const sorahpc::FlowPatchify* op, const sorahpc::Draw* draw, const Sample* sample, int64_t t,
                   int64_t h0, int64_t h1, const char* latent, char* tokens, char* target, char* scratch) {
  with_number(op->dtype, [&](auto x) {
    using T = decltype(x);
    flow_rows<T>(*op, *draw, *sample, t, h0, h1, (const T*)latent, (T*)tokens, (T*)target, (T*)scratch);
  });
}

}  // namespace
