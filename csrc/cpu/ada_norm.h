// ada_norm on CPU: a row comes from memory once, then stays in the first caches for the passes that mean, variance and
// result take over it.
#pragma once

#include "../ada_norm.h"
#include "vec.h"

namespace {

using sorahpc::AdaNorm;
using sorahpc::Rows;
using sorahpc::Sample;

template <typename T>
SORAHPC_INLINE const T* row_of(const Rows& rows, int64_t i) {
  return rows.p == nullptr ? nullptr : (const T*)rows.p + i * rows.stride;
}

// What at(width, i) gives, added up over [0, n); in four sums, so that an addition needn't wait for the one before. They
// are this function's own: a vector that a lambda adds to lives in memory.
template <typename C, typename F>
SORAHPC_INLINE C total(int64_t n, F&& at) {
  constexpr int N = LANES<C>;
  Vec<C, N> a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N) {
    a += at(width<N>{}, i);
    b += at(width<N>{}, i + N);
    c += at(width<N>{}, i + 2 * N);
    d += at(width<N>{}, i + 3 * N);
  }
  for (; i + N <= n; i += N) a += at(width<N>{}, i);
  C rest = 0;
  for (; i < n; ++i) rest += at(width<1>{}, i)[0];
  return sum<C, N>((a + b) + (c + d)) + rest;
}

// Stores v and gives it back as it was stored.
template <bool STREAM, int N, typename T, typename V>
SORAHPC_INLINE V store_rounded(T* p, V v) {
  struct {
    T x[N];
  } rounded;
  store<false, N>(rounded.x, v);
  put<STREAM>(p, bits_as<Vec<char, N * sizeof(T)>>(rounded));
  return load<N>(rounded.x);
}

template <typename C>
struct Moments {
  C mean, r;  // r = 1 / sqrt(variance + eps)
};

// Of a row x in the first cache, whose sum is known. What is left of the mean when a rounded one is taken off is added to
// it, so that the order of the sum, which is another one in each program, costs no digits.
template <typename C>
SORAHPC_INLINE Moments<C> moments_of(const C* x, int64_t M, C sum_of_x, double eps) {
  constexpr int N = LANES<C>, TOGETHER = 4;  // sums, so that an addition needn't wait for the one before
  const C guess = sum_of_x / C(M);
  Vec<C, N> offs[TOGETHER]{}, squares[TOGETHER]{};
  int64_t i = 0;
  for (; i + TOGETHER * N <= M; i += TOGETHER * N)
    unrolled<TOGETHER>([&](auto k) __attribute__((always_inline)) {
      constexpr int K = decltype(k)::value;
      const Vec<C, N> off = load<N>(x + i + K * N) - guess;
      offs[K] += off, squares[K] += off * off;
    });
  for (; i + N <= M; i += N) {
    const Vec<C, N> off = load<N>(x + i) - guess;
    offs[0] += off, squares[0] += off * off;
  }
  C left = sum<C, N>((offs[0] + offs[1]) + (offs[2] + offs[3]));
  C square = sum<C, N>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < M; ++i) {
    const C off = x[i] - guess;
    left += off, square += off * off;
  }
  left /= C(M);
  const C variance = square / C(M) - left * left;
  const C v = (variance < 0 ? 0 : variance) + C(eps);  // below 0 by rounding, of a row of equal numbers
  return {guess + left, C(1) / C(sizeof(C) == 8 ? __builtin_sqrt(v) : __builtin_sqrtf(v))};
}

// Tokens [begin, end). A row's result and the next row's sum are one loop, so that memory has reads and writes to do in
// the same breath; in loops of their own it would wait for the arithmetic of each in turn (half as slow again).
// scratch: two rows.
template <typename T, bool STREAM, bool BRANCH, bool GATED, bool MODULATED>
void ada_norm_tokens(const AdaNorm& op, const Sample* samples, int64_t begin, int64_t end, void* scratch) {
  using C = typename Compute<T>::type;
  const int64_t M = op.M;
  C *now = (C*)scratch, *next = now + M;
  // Gives a function for numbers of a row's sum, rounded as stored, into `to`. Pointers are its own: what is stored might
  // be op's, to a compiler, and would be loaded again for each vector.
  const auto taker = [&op, M](int64_t token, int64_t s, C* to) __attribute__((always_inline)) {
    return [x = row_of<T>(op.x, token), branch = row_of<T>(op.branch, token), gate = row_of<T>(op.gate, s),
            out = (T*)op.sum + token * M, to](auto w, int64_t i) __attribute__((always_inline)) {
      constexpr int N = decltype(w)::value;
      prefetch(ahead(x + i));
      Vec<C, N> v = load<N>(x + i);
      if constexpr (BRANCH) {
        prefetch(ahead(branch + i));
        Vec<C, N> b = load<N>(branch + i);
        if constexpr (GATED) b *= load<N>(gate + i);
        v = store_rounded<STREAM, N>(out + i, v + b);
      }
      store<false, N>(to + i, v);
      return v;
    };
  };
  int64_t s = find_sample(samples, op.num_samples, begin);
  C all = total<C>(M, taker(begin, s, now));
  for (int64_t token = begin; token < end; ++token) {
    const auto [mean, r] = moments_of<C>(now, M, all, op.eps);
    C* const moments = (C*)op.moments + 2 * token;
    moments[0] = mean, moments[1] = r;
    const auto give = [mean = mean, r = r, now, shift = row_of<T>(op.shift, s), scale = row_of<T>(op.scale, s),
                       y = (T*)op.y + token * M](auto w, int64_t i) __attribute__((always_inline)) {
      constexpr int N = decltype(w)::value;
      Vec<C, N> v = (load<N>(now + i) - mean) * r;
      if constexpr (MODULATED) v = v * (load<N>(scale + i) + C(1)) + load<N>(shift + i);
      store<STREAM, N>(y + i, v);
    };
    if (token + 1 == end) {
      in_vectors<LANES<C>, 1, 1>(M, give);
      break;
    }
    while (token + 1 >= samples[s + 1].first_token) ++s;
    const auto take = taker(token + 1, s, next);
    all = total<C>(M, [give, take](auto w, int64_t i) __attribute__((always_inline)) {
      give(w, i);
      return take(w, i);
    });
    C* const taken = next;
    next = now, now = taken;
  }
  if (STREAM) stream_fence();
}

// With n = (sum - mean) r and g = dy (1 + scale):
//   dx = r (g - mean(g) - n mean(g n)) + dsum    dbranch = gate dx
//   dgate += branch dx    dshift += dy    dscale += dy n
// What one row of the backward pass reads and writes.
template <typename T, bool STREAM, bool GATED, bool MODULATED>
struct BackwardRow {
  using C = typename Compute<T>::type;
  const T *x, *dy, *dsum, *branch, *gate, *scale;
  T *dx, *dbranch;
  C *dgate, *dshift, *dscale;
  C mean, r;
  C g_mean, gn_mean;  // once its sums are known

  BackwardRow(const AdaNorm& op, int64_t token, int64_t s, C* sums)
      : x(row_of<T>(op.x, token)), dy(row_of<T>(op.dy, token)), dsum(row_of<T>(op.dsum, token)),
        branch(row_of<T>(op.branch, token)), gate(row_of<T>(op.gate, s)), scale(row_of<T>(op.scale, s)),
        dx((T*)op.dx + token * op.M), dbranch((T*)op.dbranch + token * op.M), dgate(sums),
        dshift(sums + (GATED ? op.M : 0)), dscale(dshift + op.M), mean(((const C*)op.moments)[2 * token]),
        r(((const C*)op.moments)[2 * token + 1]) {}

  template <int N>
  struct Sums {
    Vec<C, N> g, gn;
  };

  // Numbers from i on: to dshift and dscale, and what they add to the sums of g and g n.
  template <int N>
  SORAHPC_INLINE Sums<N> take(int64_t i) const {
    prefetch(ahead(x + i));
    prefetch(ahead(dy + i));
    const Vec<C, N> n = (load<N>(x + i) - mean) * r;
    Vec<C, N> g = load<N>(dy + i);
    if constexpr (MODULATED) {
      store<false, N>(dshift + i, load<N>(dshift + i) + g);
      store<false, N>(dscale + i, load<N>(dscale + i) + g * n);
      g *= load<N>(scale + i) + C(1);
    }
    return {g, g * n};
  }

  // The results from i on, and to dgate.
  template <int N>
  SORAHPC_INLINE void give(int64_t i) const {
    const Vec<C, N> n = (load<N>(x + i) - mean) * r;
    Vec<C, N> g = load<N>(dy + i);
    if constexpr (MODULATED) g *= load<N>(scale + i) + C(1);
    Vec<C, N> d = (g - g_mean - n * gn_mean) * r;
    if (dsum != nullptr) {
      prefetch(ahead(dsum + i));
      d += load<N>(dsum + i);
    }
    store<STREAM, N>(dx + i, d);
    if constexpr (GATED) {
      prefetch(ahead(branch + i));
      store<STREAM, N>(dbranch + i, d * load<N>(gate + i));
      store<false, N>(dgate + i, load<N>(dgate + i) + d * load<N>(branch + i));
    }
  }
};

// Calls at(width, i) over [0, M), and sets what its sums mean to the row.
template <typename Row, typename F>
SORAHPC_INLINE void take_row(Row& row, int64_t M, F&& at) {
  using C = typename Row::C;
  constexpr int N = LANES<C>;
  typename Row::template Sums<N> a{}, b{};  // two, so that an addition needn't wait for the one before
  int64_t i = 0;
  for (; i + 2 * N <= M; i += 2 * N) {
    const auto even = at(width<N>{}, i), odd = at(width<N>{}, i + N);
    a.g += even.g, a.gn += even.gn, b.g += odd.g, b.gn += odd.gn;
  }
  C g_rest = 0, gn_rest = 0;
  for (; i < M; ++i) {
    const auto one = at(width<1>{}, i);
    g_rest += one.g[0], gn_rest += one.gn[0];
  }
  row.g_mean = (sum<C, N>(a.g + b.g) + g_rest) / C(M);
  row.gn_mean = (sum<C, N>(a.gn + b.gn) + gn_rest) / C(M);
}

// Rows whose sums are added up apart before they go to their chunk's: float32 loses nothing to speak of in so many.
constexpr int64_t TOGETHER = 32;

// As in the forward pass, a row's results and the next row's sums are one loop. scratch: [kinds, M].
template <typename T, bool STREAM, bool GATED, bool MODULATED>
void ada_norm_backward_chunks(const AdaNorm& op, const Sample* samples, int64_t begin, int64_t end, void* scratch) {
  using C = typename Compute<T>::type;
  using Row = BackwardRow<T, STREAM, GATED, MODULATED>;
  const int64_t M = op.M, numbers = op.kinds() * M;
  for (int64_t id = begin; id < end; ++id) {
    int64_t token, last;
    const int64_t s = op.tokens_of_chunk(samples, id, &token, &last);
    if (token >= last) continue;
    C *partial = (C*)op.partials + id * numbers, *sums = (C*)scratch;
    if (numbers > 0) std::memset(partial, 0, numbers * sizeof(C));
    while (token < last) {
      const int64_t until = token + TOGETHER < last ? token + TOGETHER : last;
      if (numbers > 0) std::memset(sums, 0, numbers * sizeof(C));
      Row now(op, token, s, sums);
      take_row(now, M, [&](auto w, int64_t i) __attribute__((always_inline)) {
        return now.template take<decltype(w)::value>(i);
      });
      for (++token; token < until; ++token) {
        const Row before = now;
        Row next(op, token, s, sums);
        take_row(next, M, [&](auto w, int64_t i) __attribute__((always_inline)) {
          before.template give<decltype(w)::value>(i);
          return next.template take<decltype(w)::value>(i);
        });
        now = next;
      }
      in_vectors<LANES<C>, 1, 1>(M, [&](auto w, int64_t i) __attribute__((always_inline)) {
        now.template give<decltype(w)::value>(i);
      });
      in_vectors<LANES<C>, 1, 1>(numbers, [&](auto w, int64_t i) __attribute__((always_inline)) {
        constexpr int N = decltype(w)::value;
        store<false, N>(partial + i, load<N>(partial + i) + load<N>(sums + i));
      });
    }
  }
  if (STREAM) stream_fence();
}

// Sums [begin, end) of the num_samples * kinds, each over a sample's chunks.
template <typename T>
void ada_norm_sums_typed(const AdaNorm& op, const Sample* samples, int64_t begin, int64_t end) {
  using C = typename Compute<T>::type;
  const int64_t kinds = op.kinds(), M = op.M;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t s = row / kinds, kind = row % kinds;
    const int64_t tokens = samples[s + 1].first_token - samples[s].first_token;
    const int64_t chunks = (tokens + op.chunk - 1) / op.chunk;
    const C* first = (const C*)op.partials + (op.first_chunk(samples, s) * kinds + kind) * M;
    T* out = (T*)op.sum_of(int(kind)) + s * M;
    in_vectors<LANES<C>, 1, 1>(M, [&](auto w, int64_t i) __attribute__((always_inline)) {
      constexpr int N = decltype(w)::value;
      Vec<C, N> all{};
      for (int64_t j = 0; j < chunks; ++j) all += load<N>(first + j * kinds * M + i);
      store<false, N>(out + i, all);
    });
  }
}

void ada_norm(const AdaNorm* op, const Sample* samples, int64_t begin, int64_t end, void* scratch) {
  with_number_and_stream(op->dtype, op->stream, [&](auto x, auto stream) {
    using T = decltype(x);
    const auto run = [&](auto branch, auto gated) {
      constexpr bool S = decltype(stream)::value, B = decltype(branch)::value, G = decltype(gated)::value;
      return op->scale.p != nullptr ? ada_norm_tokens<T, S, B, G, true>(*op, samples, begin, end, scratch)
                                    : ada_norm_tokens<T, S, B, G, false>(*op, samples, begin, end, scratch);
    };
    if (op->gate.p != nullptr) return run(width<1>{}, width<1>{});
    return op->branch.p != nullptr ? run(width<1>{}, width<0>{}) : run(width<0>{}, width<0>{});
  });
}

void ada_norm_backward(const AdaNorm* op, const Sample* samples, int64_t begin, int64_t end, void* scratch) {
  with_number_and_stream(op->dtype, op->stream, [&](auto x, auto stream) {
    using T = decltype(x);
    const auto run = [&](auto gated) {
      constexpr bool S = decltype(stream)::value, G = decltype(gated)::value;
      return op->scale.p != nullptr ? ada_norm_backward_chunks<T, S, G, true>(*op, samples, begin, end, scratch)
                                    : ada_norm_backward_chunks<T, S, G, false>(*op, samples, begin, end, scratch);
    };
    return op->gate.p != nullptr ? run(width<1>{}) : run(width<0>{});
  });
}

void ada_norm_sums(const AdaNorm* op, const Sample* samples, int64_t begin, int64_t end) {
  with_number(op->dtype, [&](auto x) { return ada_norm_sums_typed<decltype(x)>(*op, samples, begin, end); });
}

}  // namespace
