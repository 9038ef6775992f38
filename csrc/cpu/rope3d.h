// rope3d on CPU: tables of one row a position and axis, built for the call, then one pass over the tokens.
#pragma once

#include "../rope3d.h"
#include "vec.h"

namespace {

using sorahpc::Heads;
using sorahpc::Rope3d;
using sorahpc::Sample;
using sorahpc::Walk;

// Rope3d::angles_twice, where the loops are compiled.
template <typename T, bool INTERLEAVED>
constexpr bool ANGLES_TWICE = INTERLEAVED;
template <bool INTERLEAVED>
constexpr bool ANGLES_TWICE<bf16_t, INTERLEAVED> = false;

// The angles of one token, as the loops read them: D of each with angles_twice (cos twice; -sin, +sin), else D/2.
template <typename C>
struct Turn {
  alignas(64) C cos[sorahpc::MAX_HEAD_DIM], sin[sorahpc::MAX_HEAD_DIM];

  void set(const Rope3d& op, int axis, const C* row) {
    const int begin = axis ? op.axis_end[axis - 1] : 0, pairs = op.axis_end[axis] - begin;
    const int width = op.angles_twice() ? 2 : 1;
    std::memcpy(cos + begin * width, row, pairs * width * sizeof(C));
    std::memcpy(sin + begin * width, row + pairs * width, pairs * width * sizeof(C));
  }

  // x: numbers from i on, or pairs.
  template <int N>
  SORAHPC_INLINE Vec<C, N> turned(int64_t i, Vec<C, N> x) const {
    return x * load<N>(cos + i) + swap_pairs<C, N>(x) * load<N>(sin + i);
  }
  template <int N>
  SORAHPC_INLINE Pairs<C, N> turned(int64_t i, Pairs<C, N> x) const {
    const Vec<C, N> c = load<N>(cos + i), s = load<N>(sin + i);
    return {x.a * c - x.b * s, x.b * c + x.a * s};
  }
};

// What is turned at once of a head x: numbers from i on, or pairs.
template <bool INTERLEAVED, int N, typename T>
SORAHPC_INLINE auto load_part(const T* x, int D, int64_t i) {
  if constexpr (ANGLES_TWICE<T, INTERLEAVED>)
    return load<N>(x + i);
  else if constexpr (INTERLEAVED)
    return load_pairs<N>(x + 2 * i);
  else
    return Pairs<typename Compute<T>::type, N>{load<N>(x + i), load<N>(x + i + D / 2)};
}

template <bool INTERLEAVED, bool STREAM, int N, typename T>
SORAHPC_INLINE void store_part(T* y, int, int64_t i, Vec<typename Compute<T>::type, N> part) {
  store<STREAM, N>(y + i, part);
}

template <bool INTERLEAVED, bool STREAM, int N, typename T>
SORAHPC_INLINE void store_part(T* y, int D, int64_t i, Pairs<typename Compute<T>::type, N> part) {
  if constexpr (INTERLEAVED) {
    store_pairs<STREAM, N>(y + 2 * i, part);
  } else {
    store<STREAM, N>(y + i, part.a);
    store<STREAM, N>(y + i + D / 2, part.b);
  }
}

// Turns a head of T: load_at(width, i) gives a part of it, store_at(width, i, part) takes it turned.
template <typename T, bool INTERLEAVED, typename C, typename Load, typename Store>
SORAHPC_INLINE void turn(const Turn<C>& by, int D, Load&& load_at, Store&& store_at) {
  constexpr bool TWICE = ANGLES_TWICE<T, INTERLEAVED>;
  in_vectors<LANES<C>, TWICE ? 2 : 1>(TWICE ? D : D / 2, [&](auto w, int64_t i) __attribute__((always_inline)) {
    store_at(w, i, by.template turned<decltype(w)::value>(i, load_at(w, i)));
  });
}

// Heads are taken so many at a time, a pass over all of them for each step of the norm: one head's chain of sum, root
// and division takes as long as all its arithmetic, and the machine can only overlap what it has room to look ahead to.
constexpr int GROUP = 8;

// r[n] = 1 / rms of head n. Sums are plain loops: a vector that a lambda adds to lives in memory.
template <typename C, typename T>
SORAHPC_INLINE void inverse_rms(const T* x, int64_t stride, int heads, int D, C eps, C* r) {
  constexpr int N = LANES<C>;
  for (int n = 0; n < heads; ++n, x += stride) {
    Vec<C, N> total{};
    int i = 0;
    for (; i + N <= D; i += N) {
      const Vec<C, N> v = load<N>(x + i);
      total += v * v;
    }
    C rest = 0;
    for (; i < D; ++i) rest += load<1>(x + i)[0] * load<1>(x + i)[0];
    r[n] = sum<C, N>(total) + rest;
  }
  const C share = C(1) / C(D);
  for (int n = 0; n < GROUP; ++n) r[n] = C(1) / C(sizeof(C) == 8 ? __builtin_sqrt(r[n] * share + eps)
                                                                  : __builtin_sqrtf(r[n] * share + eps));
}

// Whether the next token is asked for ahead. With narrow vectors a line of the cache takes so many instructions that no
// machine looks far enough ahead by itself: bfloat16 would take a quarter longer. With wide ones Intel's gain a sixth,
// where AMD's lose as much.
bool asks_ahead() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
  return intel || VECTOR_BYTES < 64;
#else
  return true;
#endif
}

// next: from a head to the same one of the next token, in elements of x; 0 asks for nothing.
template <typename T, bool INTERLEAVED, bool STREAM>
SORAHPC_INLINE void forward_heads(const T* x, int64_t stride, int64_t next, T* y, int heads,
                                  const typename Compute<T>::type* weight, const Rope3d& op,
                                  const Turn<typename Compute<T>::type>& by) {
  using C = typename Compute<T>::type;
  constexpr bool TWICE = ANGLES_TWICE<T, INTERLEAVED>;
  const int D = op.head_dim;
  C r[GROUP] = {};
  if (weight != nullptr) inverse_rms<C>(x, stride, heads, D, C(op.eps), r);
  for (int n = 0; n < heads; ++n, x += stride, y += D) {
    const auto load_at = [&](auto w, int64_t i) __attribute__((always_inline)) {
      if (next) prefetch(x + next + (TWICE ? i : 2 * i));
      return load_part<INTERLEAVED, decltype(w)::value>(x, D, i);
    };
    const auto put_at = [&](auto w, int64_t i, auto part) __attribute__((always_inline)) {
      store_part<INTERLEAVED, STREAM, decltype(w)::value>(y, D, i, part);
    };
    if (weight == nullptr)
      turn<T, INTERLEAVED>(by, D, load_at, put_at);
    else
      turn<T, INTERLEAVED>(by, D, [&](auto w, int64_t i) __attribute__((always_inline)) {
        return load_at(w, i) * r[n] * load_part<TWICE, decltype(w)::value>(weight, D, i);
      }, put_at);
  }
}

// dx = r (g w - x r^2 mean(g w x)) and dweight += g x r, with g = dy turned back and r = 1 / rms(x).
template <typename T, bool INTERLEAVED, bool STREAM>
SORAHPC_INLINE void backward_heads(const T* dy, int64_t dy_stride, const T* x, int64_t stride, T* dx, int heads,
                                   const typename Compute<T>::type* weight, typename Compute<T>::type* dweight,
                                   const Rope3d& op, const Turn<typename Compute<T>::type>& by) {
  using C = typename Compute<T>::type;
  constexpr int N = LANES<C>;
  const int D = op.head_dim;
  alignas(64) C g[GROUP][sorahpc::MAX_HEAD_DIM];
  C r[GROUP] = {}, shrink[GROUP];
  inverse_rms<C>(x, stride, heads, D, C(op.eps), r);
  for (int n = 0; n < heads; ++n)
    turn<T, INTERLEAVED>(
        by, D,
        [&](auto w, int64_t i) __attribute__((always_inline)) {
          return load_part<INTERLEAVED, decltype(w)::value>(dy + n * dy_stride, D, i);
        },
        [&](auto w, int64_t i, auto part) __attribute__((always_inline)) {
          store_part<INTERLEAVED, false, decltype(w)::value>(g[n], D, i, part);
        });
  for (int n = 0; n < heads; ++n) {
    const T* saved = x + n * stride;
    Vec<C, N> total{};
    int i = 0;
    for (; i + N <= D; i += N) {
      const Vec<C, N> gx = load<N>(g[n] + i) * load<N>(saved + i);
      store<false, N>(dweight + i, load<N>(dweight + i) + gx * r[n]);
      total += gx * load<N>(weight + i);
    }
    C rest = 0;
    for (; i < D; ++i) {
      const C gx = g[n][i] * load<1>(saved + i)[0];
      dweight[i] += gx * r[n];
      rest += gx * weight[i];
    }
    shrink[n] = r[n] * r[n] * ((sum<C, N>(total) + rest) / D);
  }
  for (int n = 0; n < heads; ++n)
    in_vectors<N>(D, [&](auto w, int64_t i) __attribute__((always_inline)) {
      constexpr int N = decltype(w)::value;
      const Vec<C, N> gw = load<N>(g[n] + i) * load<N>(weight + i);
      store<STREAM, N>(dx + n * D + i, r[n] * (gw - load<N>(x + n * stride + i) * shrink[n]));
    });
}

// Weights as load_pairs takes a head apart, and none of the NaN that store_pairs can't take.
template <typename C>
const C* take_apart(const C* weight, int D, C* apart) {
  for (int i = 0; i < D; ++i)
    apart[i % 2 * (D / 2) + i / 2] = weight[i] == weight[i] ? weight[i] : C(__builtin_nan(""));
  return apart;
}

// Tokens [begin, end) of the num_tokens. Tables as of rope3d_table, one an axis.
template <typename T, bool INTERLEAVED, bool STREAM>
void rope3d_tokens(const Rope3d& op, const void* const* tables, const Sample* samples, int64_t num_samples,
                   int64_t begin, int64_t end) {
  using C = typename Compute<T>::type;
  const int row = op.angles_twice() ? 4 : 2;  // numbers a pair in a table
  const bool ahead = asks_ahead();
  const int64_t D = op.head_dim;
  Walk walk(samples, num_samples, op.first + begin);
  int32_t now[3] = {-1, -1, -1};
  Turn<C> by;
  const C* weights[2] = {(const C*)op.qk[0].weight, (const C*)op.qk[1].weight};
  constexpr bool APART = INTERLEAVED && !ANGLES_TWICE<T, INTERLEAVED>;
  alignas(64) C apart[2][APART ? sorahpc::MAX_HEAD_DIM : 1];
  if constexpr (APART)
    for (int i = 0; i < 2; ++i)
      if (weights[i] != nullptr && !op.backward) weights[i] = take_apart(weights[i], op.head_dim, apart[i]);
  for (int64_t token = begin; token < end; ++token, walk.next()) {
    const int32_t at[] = {walk.t, walk.h, walk.w};
    for (int a = 0; a < 3; ++a) {
      if (at[a] == now[a]) continue;
      const int pairs = op.axis_end[a] - (a ? op.axis_end[a - 1] : 0);
      by.set(op, a, (const C*)tables[a] + at[a] * pairs * row);
      now[a] = at[a];
    }
    for (int which = 0; which < 2; ++which) {
      const Heads& h = op.qk[which];
      const T* x = (const T*)h.x + token * h.token_stride;
      const T* saved = (const T*)h.saved + token * h.saved_token_stride;
      T* out = (T*)h.out + token * h.num_heads * D;
      const C* weight = weights[which];
      for (int64_t n = 0; n < h.num_heads; n += GROUP) {
        const int heads = int(h.num_heads - n < GROUP ? h.num_heads - n : GROUP);
        if (op.backward)
          backward_heads<T, INTERLEAVED, STREAM>(x + n * h.head_stride, h.head_stride, saved + n * h.saved_head_stride,
                                                 h.saved_head_stride, out + n * D, heads, weight,
                                                 (C*)h.dweight + token / op.chunk * D, op, by);
        else
          forward_heads<T, INTERLEAVED, STREAM>(x + n * h.head_stride, h.head_stride, ahead ? h.token_stride : 0,
                                                out + n * D, heads, weight, op, by);
      }
    }
  }
  if (STREAM) stream_fence();
}

void rope3d(const Rope3d* op, const void* const* tables, const Sample* samples, int64_t num_samples, int64_t begin,
            int64_t end) {
  with_number_and_stream(op->dtype, op->stream, [&](auto x, auto stream) {
    using T = decltype(x);
    constexpr bool STREAM = decltype(stream)::value;
    return op->interleaved ? rope3d_tokens<T, true, STREAM>(*op, tables, samples, num_samples, begin, end)
                           : rope3d_tokens<T, false, STREAM>(*op, tables, samples, num_samples, begin, end);
  });
}

}  // namespace
