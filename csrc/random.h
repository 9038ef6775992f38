// Normal noise that is the same to the bit everywhere: Philox4x32-10 (Salmon et al. 2011) and Box-Muller (1958), in
// integers and in float32 operations that IEEE 754 rounds in one way only. sorahpc/ops/flow_patchify.py is the
// reference. No torch types.
//
// M is the machine: on CUDA one number a thread, on CPU a vector. It has F, U and I (float, uint32 and int32 of the same
// number of lanes), W (uint64, a lane a block of four words), and the operations used below. mul and add are each
// rounded: compilers must not fuse them.
#pragma once

#include "pack.h"

namespace sorahpc {

constexpr int ROUNDS = 10;

// Words c[0] to c[3] of a counter -> four random words. Only the low 32 bits of a lane count. Two keys a round.
template <typename M>
SORAHPC_HD void philox(typename M::W* c, const uint64_t* keys) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < ROUNDS; ++round) {
    const typename M::W p0 = M::wide(c[0], 0xD2511F53u), p1 = M::wide(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ keys[2 * round];
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ keys[2 * round + 1];
    c[3] = p0;
  }
}

// Horner: k[0] + x (k[1] + x (k[2] + ...)).
template <typename M, int N>
SORAHPC_HD typename M::F polynomial(typename M::F x, const float (&k)[N]) {
  typename M::F y = M::f(k[N - 1]);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int i = N - 2; i >= 0; --i) y = M::add(M::mul(y, x), M::f(k[i]));
  return y;
}

// sin(x pi / 2) / x and cos(x pi / 2) as polynomials of x^2, for x in [-1/2, 1/2].
#ifdef __CUDACC__
__device__
#endif
constexpr float SIN_OF_QUARTERS[] = {1.5707963705062866f, -0.645966649055481f, 0.07971252501010895f,
                                     -0.004685971420258284f};
#ifdef __CUDACC__
__device__
#endif
constexpr float COS_OF_QUARTERS[] = {1.0f, -1.2337005138397217f, 0.25366854667663574f, -0.02085559442639351f,
                                     0.0008944734581746161f};

// Two words -> two independent standard normals: the root of -2 ln u, times cos and sin of 2 pi v, with
// u = (float(a >> 1) + 0.5) / 2^31 rounded to float, never 0, and v the middle of b's 64 neighbours.
template <typename M>
SORAHPC_HD void normals(typename M::U a, typename M::U b, typename M::F& with_cos, typename M::F& with_sin) {
  using F = typename M::F;
  using U = typename M::U;
  using I = typename M::I;
  // 2^31 u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), so that near u = 1 nothing cancels.
  const float ln[] = {1.0f,
                      -0.6666781902313232f,
                      0.5000267028808594f,
                      -0.399262011051178f,
                      0.33155304193496704f,
                      -0.2982901632785797f,
                      0.2853386700153351f,
                      -0.1740080565214157f};
  const I bits = M::template bits_as<I>(M::add(M::to_float(M::template bits_as<I>(a >> 1)), M::f(0.5f))) - 0x3f3504f3;
  const F e = M::to_float((bits >> 23) - 31);
  const F f = M::add(M::template bits_as<F>((bits & 0x007fffff) + 0x3f3504f3), M::f(-1.0f));
  const F head = M::add(M::mul(M::mul(f, f), polynomial<M>(f, ln)), M::mul(f, M::f(-2.0f)));
  const F radius = M::root(M::add(head, M::mul(e, M::f(-1.3862943649291992f))));
  // Quarter q of the circle and x in (-1/2, 1/2) quarters from its middle: an odd multiple of 2^-25, so exact.
  const F x = M::mul(M::to_float((M::template bits_as<I>(b << 2) >> 7) | 1), M::f(0x1p-25f)), z = M::mul(x, x);
  const F s = M::mul(radius, M::mul(x, polynomial<M>(z, SIN_OF_QUARTERS))), c = M::mul(radius, polynomial<M>(z, COS_OF_QUARTERS));
  const U q = b + 0x20000000u;  // in the top two bits
  const auto odd = (q & 0x40000000u) != 0u;
  const U s_bits = M::template bits_as<U>(s), c_bits = M::template bits_as<U>(c);
  with_cos = M::template bits_as<F>(M::select(odd, s_bits, c_bits) ^ ((q ^ (q << 1)) & 0x80000000u));
  with_sin = M::template bits_as<F>(M::select(odd, c_bits, s_bits) ^ (q & 0x80000000u));
}

// Where a sample's noise is drawn from. Its element e is word e % 4 of block e / 4, in the order of the latent.
//
// Key: the seed with its top bit set. Counter: block, visit, id. All distinct for seed and id < 2^63, visit < 2^32 and
// less than 2^34 elements; and apart, by that bit, from what torch's CUDA generator draws with the same seed.
struct Stream {
  uint64_t id;
  uint32_t visit;
  uint64_t keys[2 * ROUNDS];

  SORAHPC_HD Stream(uint64_t seed, uint64_t id, uint32_t visit) : id(id), visit(visit) {
    uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32) | 0x80000000u;
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < ROUNDS; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u)
      keys[2 * round] = low, keys[2 * round + 1] = high;
  }

  template <typename M>
  SORAHPC_HD void words(typename M::W block, typename M::W* c) const {
    c[0] = block;
    c[1] = M::w(visit);
    c[2] = M::w(uint32_t(id));
    c[3] = M::w(id >> 32);
    philox<M>(c, keys);
  }
};

constexpr int64_t MAX_NOISE = int64_t(1) << 34;

}  // namespace sorahpc
