// Many positional reads at once, spread over threads, each with its crc32: how samples come out of a cache.
// No Python, no torch, no state that outlives a call: nothing for a fork to break.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <algorithm>
#include <array>
#include <atomic>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define SORAHPC_CRC_CLMUL 1
#include <immintrin.h>
#endif

namespace sorahpc {

// The crc32 of zlib: polynomial 0x04C11DB7 reflected, starting from and ending with all bits inverted.
namespace crc {

constexpr uint32_t kPolynomial = 0xEDB88320u;

// x^n mod P, reflected: bit 31 is x^0.
constexpr uint32_t power_of_x(int n) {
  uint32_t r = 0x80000000u;
  for (int i = 0; i < n; ++i) r = (r & 1) ? (r >> 1) ^ kPolynomial : r >> 1;
  return r;
}

// What a carry-less product moves 64 bits of a message by `distance` bits with. The shift is of the reflected form: a
// product of two 64-bit values has 127 bits, one less than the register.
constexpr uint64_t fold_by(int distance) { return uint64_t(power_of_x(distance)) << 1; }
static_assert(fold_by(4 * 128 + 32) == 0x154442BD4u && fold_by(4 * 128 - 32) == 0x1C6E41596u,
              "the constants of the literature, for four registers of 128 bits");

using Tables = std::array<std::array<uint32_t, 256>, 8>;
constexpr Tables make_tables() {
  Tables t{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = (c & 1) ? (c >> 1) ^ kPolynomial : c >> 1;
    t[0][i] = c;
  }
  for (size_t s = 1; s < 8; ++s)
    for (size_t i = 0; i < 256; ++i) t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 0xFF];
  return t;
}
constexpr Tables kTables = make_tables();

// Eight bytes a step. `c` here and below is the running value, not inverted.
inline uint32_t by_table(uint32_t c, const unsigned char* p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) {
    uint32_t a = c ^ (uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24);
    c = kTables[7][a & 0xFF] ^ kTables[6][(a >> 8) & 0xFF] ^ kTables[5][(a >> 16) & 0xFF] ^ kTables[4][a >> 24] ^
        kTables[3][p[4]] ^ kTables[2][p[5]] ^ kTables[1][p[6]] ^ kTables[0][p[7]];
  }
  for (; n; ++p, --n) c = (c >> 8) ^ kTables[0][(c ^ *p) & 0xFF];
  return c;
}

#ifdef SORAHPC_CRC_CLMUL
// Four registers run over the message, each multiplied ahead by the length of all four. What they end with is a message
// of that length with the same remainder; the table does it and what is left over.
__attribute__((target("pclmul,sse4.1"))) inline uint32_t by_clmul128(uint32_t c, const unsigned char* p, size_t n) {
  constexpr size_t kStep = 64;
  if (n < 2 * kStep) return by_table(c, p, n);
  const __m128i k = _mm_set_epi64x(int64_t(fold_by(512 - 32)), int64_t(fold_by(512 + 32)));
  __m128i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
  x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128(int(c)));
  for (p += kStep, n -= kStep; n >= kStep; p += kStep, n -= kStep)
    for (int i = 0; i < 4; ++i) {
      const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i);
      const __m128i low = _mm_clmulepi64_si128(x[i], k, 0x00), high = _mm_clmulepi64_si128(x[i], k, 0x11);
      x[i] = _mm_xor_si128(_mm_xor_si128(low, high), next);
    }
  unsigned char rest[kStep];
  std::memcpy(rest, x, kStep);
  return by_table(by_table(0, rest, kStep), p, n);
}

__attribute__((target("vpclmulqdq,avx512f"))) inline uint32_t by_clmul512(uint32_t c, const unsigned char* p,
                                                                            size_t n) {
  constexpr size_t kStep = 256;
  if (n < 8 * kStep) return by_clmul128(c, p, n);
  const __m512i k = _mm512_set4_epi32(int(fold_by(2048 - 32) >> 32), int(fold_by(2048 - 32)),
                                      int(fold_by(2048 + 32) >> 32), int(fold_by(2048 + 32)));
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(p + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(c))));
  for (p += kStep, n -= kStep; n >= kStep; p += kStep, n -= kStep)
    for (int i = 0; i < 4; ++i) {
      const __m512i low = _mm512_clmulepi64_epi128(x[i], k, 0x00), high = _mm512_clmulepi64_epi128(x[i], k, 0x11);
      x[i] = _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(p + 64 * i), 0x96);  // a ^ b ^ c
    }
  unsigned char rest[kStep];
  std::memcpy(rest, x, kStep);
  return by_clmul128(by_clmul128(0, rest, kStep), p, n);
}
#endif

using Update = uint32_t (*)(uint32_t, const unsigned char*, size_t);

// The ways that this machine has, slowest first.
inline std::vector<std::pair<const char*, Update>> ways() {
  std::vector<std::pair<const char*, Update>> found{{"table", by_table}};
#ifdef SORAHPC_CRC_CLMUL
  if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
    found.emplace_back("clmul128", by_clmul128);
    if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f"))
      found.emplace_back("clmul512", by_clmul512);
  }
#endif
  return found;
}

}  // namespace crc

struct ReadRequest {
  int64_t fd, offset, nbytes, at;  // at: where in the caller's buffer
};

struct ReadResult {
  int64_t error;  // errno, or 0
  int64_t done;   // bytes read: less than asked for after an error, or where the file ends
  int64_t crc32;  // of these bytes; 0 where it wasn't asked for
};

// With its crc, a request is read in blocks that are still in the core's own cache when they are summed. The kernel reads
// ahead by what is asked for, which then is too little: so what is not in memory it is told of ahead of these blocks, but
// not of all of a long request at once, whose first block would wait for the pages of the last.
constexpr int64_t kCrcBlock = 256 << 10, kToldAhead = 4 << 20;
// Starting a thread costs 10 to 20 us, in which one core copies this much out of the page cache.
constexpr int64_t kBytesWorthAThread = 512 << 10;

inline ReadResult read_one(const ReadRequest& request, unsigned char* out, crc::Update update) {
  ReadResult result{0, 0, 0};
  uint32_t c = ~0u;
  int64_t told = request.nbytes;
  if (update && request.nbytes > kCrcBlock) {
    iovec first{out + request.at, size_t(kCrcBlock)};
    const ssize_t got = ::preadv2(int(request.fd), &first, 1, off_t(request.offset), RWF_NOWAIT);
    if (got > 0) {
      c = update(c, out + request.at, size_t(got));
      result.done = got;
    }
    if (got < kCrcBlock) told = result.done;  // not all of it in memory, or a file system that doesn't say
  }
  while (result.done < request.nbytes) {
    if (told < request.nbytes && told <= result.done + kToldAhead / 2) {
      const int64_t end = std::min(result.done + kToldAhead, request.nbytes);
      ::posix_fadvise(int(request.fd), request.offset + told, end - told, POSIX_FADV_WILLNEED);
      told = end;
    }
    const int64_t left = request.nbytes - result.done;
    const size_t want = size_t(update ? std::min(left, kCrcBlock) : left);
    unsigned char* to = out + request.at + result.done;
    const ssize_t got = ::pread(int(request.fd), to, want, off_t(request.offset + result.done));
    if (got < 0) {
      if (errno == EINTR) continue;
      result.error = errno;
      break;
    }
    if (got == 0) break;  // the file ends here
    if (update) c = update(c, to, size_t(got));
    result.done += got;
  }
  result.crc32 = update ? int64_t(uint32_t(~c)) : 0;
  return result;
}

// Reads all requests, in any order, with at most `threads` threads, the caller's among them. The caller has seen to it
// that each lies inside `out` and that none overlaps another.
inline void read_batch(const ReadRequest* requests, ReadResult* results, int64_t count, unsigned char* out, int threads,
                       crc::Update update) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += requests[i].nbytes;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      results[i] = read_one(requests[i], out, update);
  };
  const int64_t worth = std::min({int64_t(threads), count, 1 + total / kBytesWorthAThread});
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < worth; ++t) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had (a limit of the job): those that there are do it all.
  }
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace sorahpc
