// patchify on CPU. Either direction turns matrices over: what is a row of pixels on one side is a column on the other,
// of one unit a token. Blocks of them are turned in registers. To get past the caches, whole lines of tokens are written
// at once; what comes in smaller pieces is first put together in memory that stays in the second cache.
#pragma once

#include "../patchify.h"
#include "copy.h"
#include "vec.h"

namespace {

using sorahpc::Patchify;
using sorahpc::Sample;

// n runs of BYTES each. A constant size turns memcpy into one load and one store; a size known only at run time costs
// a library call a run (2 to 3 times slower at pw = 2).
template <int BYTES>
void copy_runs(char* dst, int64_t dst_stride, const char* src, int64_t src_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, BYTES);
}

void copy_runs(int64_t bytes, char* dst, int64_t dst_stride, const char* src, int64_t src_stride, int64_t n) {
  switch (bytes) {
    case 2: return copy_runs<2>(dst, dst_stride, src, src_stride, n);
    case 4: return copy_runs<4>(dst, dst_stride, src, src_stride, n);
    case 8: return copy_runs<8>(dst, dst_stride, src, src_stride, n);
    case 16: return copy_runs<16>(dst, dst_stride, src, src_stride, n);
    case 32: return copy_runs<32>(dst, dst_stride, src, src_stride, n);
    case 64: return copy_runs<64>(dst, dst_stride, src, src_stride, n);
    default:
      for (int64_t i = 0; i < n; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, bytes);
  }
}

// Some token rows of one frame, all channels: where they lie on either side. Strides in bytes.
struct TokenRows {
  char* pixels;  // of the first channel and frame of pixels, at the first row
  int64_t channel, frame, row;
  char* tokens;

  char* pixel_row(int64_t c, int64_t it, int64_t y) const { return pixels + c * channel + it * frame + y * row; }
};

// What is turned over for a token row. Channels first: one matrix of all its rows of pixels, in units of a patch's
// width. Last: one for each (it, ih), of its rows in all channels, in units of a pixel.
struct Matrices {
  int64_t number, rows, rows_a_channel, columns, columns_a_token;

  Matrices(const Patchify& p, int64_t W)
      : number(p.channels_last ? p.pt * p.ph : 1),
        rows(p.token_size() / p.pw / number),
        rows_a_channel(p.pt * p.ph / number),
        columns(p.channels_last ? W * p.pw : W),
        columns_a_token(columns / W) {}
};

// N rows of N units: rows i and i + N / 2 interleaved, log2(N) times.
template <typename U, int N>
SORAHPC_INLINE void turn_over(Vec<U, N> (&v)[N]) {
  for (int step = 1; step < N; step *= 2) {
    Vec<U, N> w[N];
    unrolled<N / 2>([&](auto k) __attribute__((always_inline)) {
      constexpr int i = decltype(k)::value;
      interleave<U, N>(v[i], v[i + N / 2], w[2 * i], w[2 * i + 1]);
    });
    unrolled<N>([&](auto k) __attribute__((always_inline)) { v[decltype(k)::value] = w[decltype(k)::value]; });
  }
}

// In blocks of N * N units U; a last block overlaps the one before it, and moves some of its units a second time.
// STREAM: to tokens only, see `stream_lines`.
template <typename U, int N, bool TO_TOKENS, bool STREAM = false>
void turn_matrices(const Patchify& p, const Matrices& m, int64_t num_rows, int64_t W, const TokenRows& at) {
  const int64_t unit = sizeof(U), token_bytes = m.number * m.rows * m.columns_a_token * unit;
  int64_t column[N];  // where one lies in the tokens, from the first of its block on
  for (int64_t i = 0; i < N; ++i)
    column[i] = i / m.columns_a_token * token_bytes + i % m.columns_a_token * m.rows * unit;
  for (int64_t h = 0; h < num_rows; ++h)
    for (int64_t which = 0; which < m.number; ++which)
      for (int64_t r = 0; r < m.rows; r += N) {
        const int64_t first = r + N <= m.rows ? r : m.rows - N;
        char* row[N];
        for (int64_t i = 0; i < N; ++i) {
          const int64_t in_patch = which + (first + i) % m.rows_a_channel;
          row[i] = at.pixel_row((first + i) / m.rows_a_channel, in_patch / p.ph, h * p.ph + in_patch % p.ph);
        }
        char* const tokens = at.tokens + h * W * token_bytes + (which * m.columns_a_token * m.rows + first) * unit;
        for (int64_t x = 0; x < m.columns; x += N) {
          const int64_t begin = x + N <= m.columns ? x : m.columns - N;
          char* const block = tokens + begin / m.columns_a_token * token_bytes;
          Vec<U, N> v[N];
          unrolled<N>([&](auto k) __attribute__((always_inline)) {
            constexpr int i = decltype(k)::value;
            const char* const from = TO_TOKENS ? row[i] + begin * unit : block + column[i];
            // Tokens are read with gaps, for another row of blocks to fill: the same number of lines is further on.
            prefetch(TO_TOKENS ? ahead(from) : from + (1 << 14));
            std::memcpy(&v[i], from, sizeof(v[i]));
          });
          turn_over<U, N>(v);
          unrolled<N>([&](auto k) __attribute__((always_inline)) {
            constexpr int i = decltype(k)::value;
            put<STREAM>(TO_TOKENS ? block + column[i] : row[i] + begin * unit, v[i]);
          });
        }
      }
}

// Whether it could: the widest blocks that the matrix has room for, and in which a block's columns are whole tokens'.
template <typename U, int N = LANES<U> < 16 ? LANES<U> : 16>
bool turn_rows(const Patchify& p, bool to_tokens, int64_t num_rows, int64_t W, const TokenRows& at) {
  const Matrices m(p, W);
  if (m.rows >= N && m.columns >= N && N % m.columns_a_token == 0) {
    to_tokens ? turn_matrices<U, N, true>(p, m, num_rows, W, at) : turn_matrices<U, N, false>(p, m, num_rows, W, at);
    return true;
  }
  if constexpr (N > 2) return turn_rows<U, N / 2>(p, to_tokens, num_rows, W, at);
  return false;
}

// Rows that are whole lines of the cache, in blocks a line wide, so that each vector of a block is one. Whether it
// could: with narrower vectors a block doesn't fit the registers, and takes four times as long as by way of the scratch
// memory.
template <typename U>
bool stream_lines(const Patchify& p, int64_t num_rows, int64_t W, const TokenRows& at) {
  if constexpr (VECTOR_BYTES == 64) {
    constexpr int N = 64 / sizeof(U);
    const Matrices m(p, W);
    if (uintptr_t(at.tokens) % 64 == 0 && m.rows % N == 0 && m.columns >= N && N % m.columns_a_token == 0) {
      turn_matrices<U, N, true, true>(p, m, num_rows, W, at);
      return true;
    }
  }
  return false;
}

// Any sizes: run by run, of what is contiguous on both sides.
void copy_rows(const Patchify& p, int item_bytes, bool to_tokens, int64_t num_rows, int64_t W, const TokenRows& at) {
  const int64_t token_bytes = p.token_size() * item_bytes, run = p.channels_last ? 1 : p.pw;
  for (int64_t h = 0; h < num_rows; ++h)
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t it = 0; it < p.pt; ++it)
        for (int64_t ih = 0; ih < p.ph; ++ih)
          for (int64_t iw = 0; iw < p.pw; iw += run) {
            char* const a = at.pixel_row(c, it, h * p.ph + ih) + iw * item_bytes;
            char* const b = at.tokens + h * W * token_bytes + p.in_token(c, it, ih, iw) * item_bytes;
            if (to_tokens)
              copy_runs(run * item_bytes, b, token_bytes, a, p.pw * item_bytes, W);
            else
              copy_runs(run * item_bytes, a, p.pw * item_bytes, b, token_bytes, W);
          }
}

int64_t unit_of(const Patchify& p, int item_bytes) { return (p.channels_last ? 1 : p.pw) * item_bytes; }

void move_rows(const Patchify& p, int item_bytes, bool to_tokens, int64_t num_rows, int64_t W, const TokenRows& at) {
  const int64_t unit = unit_of(p, item_bytes);
  if (unit == 2 && turn_rows<uint16_t>(p, to_tokens, num_rows, W, at)) return;
  if (unit == 4 && turn_rows<uint32_t>(p, to_tokens, num_rows, W, at)) return;
  if (unit == 8 && turn_rows<uint64_t>(p, to_tokens, num_rows, W, at)) return;
  copy_rows(p, item_bytes, to_tokens, num_rows, W, at);
}

void patchify(const Patchify* op, int item_bytes, bool to_tokens, const Sample* sample, int64_t t, int64_t h0,
              int64_t h1, char* latent, char* tokens, char* scratch) {
  const Patchify& p = *op;
  const Sample& s = *sample;
  const int64_t num_rows = h1 - h0, tokens_bytes = num_rows * s.W * p.token_size() * item_bytes;
  TokenRows at;
  at.row = s.W * p.pw * item_bytes, at.frame = s.H * p.ph * at.row, at.channel = s.T * p.pt * at.frame;
  at.pixels = latent + t * p.pt * at.frame + h0 * p.ph * at.row;
  at.tokens = tokens + (t * s.H + h0) * s.W * p.token_size() * item_bytes;
  if (scratch == nullptr) return move_rows(p, item_bytes, to_tokens, num_rows, s.W, at);
  const int64_t unit = unit_of(p, item_bytes);
  if (to_tokens && unit == 4 && stream_lines<uint32_t>(p, num_rows, s.W, at)) return;
  if (to_tokens && unit == 8 && stream_lines<uint64_t>(p, num_rows, s.W, at)) return;
  TokenRows near = at;
  if (to_tokens) {
    near.tokens = scratch;
  } else {
    near.pixels = scratch, near.frame = num_rows * p.ph * at.row, near.channel = p.pt * near.frame;
  }
  move_rows(p, item_bytes, to_tokens, num_rows, s.W, near);
  if (to_tokens) {
    copy_out(at.tokens, scratch, tokens_bytes);
  } else {
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t it = 0; it < p.pt; ++it) copy_out(at.pixel_row(c, it, 0), near.pixel_row(c, it, 0), near.frame);
  }
}

}  // namespace
