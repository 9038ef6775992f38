// rope3d on CUDA, q and k in one launch. A block takes a few tokens: their angles into shared memory once, then all
// heads of q and k, a group of lanes a head. Angles are made in the kernel, so no table is read: a double product, then
// sin_cos; at most D/2 of them a token, for 2 N heads.
#include "../rope3d.h"

#include "number.cuh"
#include "pack.cuh"

namespace {

using sorahpc::from_float;
using sorahpc::Heads;
using sorahpc::Pack;
using sorahpc::Rope3d;
using sorahpc::Sample;
using sorahpc::to_float;

constexpr int THREADS = 256, TOKENS = 4, MAX_PAIRS = sorahpc::MAX_HEAD_DIM / 2;
enum Mode { TURN, NORM, NORM_BACKWARD };

// A lane holds 2 VEC numbers of a head, VEC pairs: where j of them lies in the head, and which pair the m-th is.
template <int VEC, bool INTERLEAVED>
struct Place {
  static constexpr bool SPLIT = !INTERLEAVED || VEC > 1;  // VEC numbers of either half of the head, else two neighbours
  static __device__ __forceinline__ int number(int unit, int j, int D) {
    if (!SPLIT) return 2 * unit + j;
    return j < VEC ? unit * VEC + j : D / 2 + unit * VEC + j - VEC;
  }
  static __device__ __forceinline__ int pair(int unit, int m, int D) {
    if (!INTERLEAVED || !SPLIT) return unit * VEC + m;
    return number(unit, 2 * m, D) / 2;
  }
  // The two numbers of pair m among a lane's.
  static __device__ __forceinline__ int one(int m) { return INTERLEAVED ? 2 * m : m; }
  static __device__ __forceinline__ int other(int m) { return INTERLEAVED ? 2 * m + 1 : VEC + m; }
};

template <typename T, int VEC, bool SPLIT>
__device__ __forceinline__ void load_unit(float (&v)[2 * VEC], const T* head, int unit, int D) {
  if constexpr (SPLIT) {
    float a[VEC], b[VEC];
    sorahpc::load<VEC>(head + unit * VEC, a);
    sorahpc::load<VEC>(head + D / 2 + unit * VEC, b);
#pragma unroll
    for (int j = 0; j < VEC; ++j) v[j] = a[j], v[VEC + j] = b[j];
  } else {
    v[0] = to_float(head[2 * unit]), v[1] = to_float(head[2 * unit + 1]);
  }
}

template <typename T, int VEC, bool SPLIT>
__device__ __forceinline__ void store_unit(T* head, int unit, int D, const float (&v)[2 * VEC]) {
  if constexpr (SPLIT) {
    float a[VEC], b[VEC];
#pragma unroll
    for (int j = 0; j < VEC; ++j) a[j] = v[j], b[j] = v[VEC + j];
    sorahpc::store<VEC>(head + unit * VEC, a);
    sorahpc::store<VEC>(head + D / 2 + unit * VEC, b);
  } else {
    head[2 * unit] = from_float<T>(v[0]), head[2 * unit + 1] = from_float<T>(v[1]);
  }
}

__device__ __forceinline__ float group_sum(float x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// lanes: a power of two of at most 32, K * lanes >= D / (2 VEC). Without a norm's gradient blocks stride over all tiles;
// with it a block takes one chunk of tokens.
template <typename T, int VEC, int K, bool INTERLEAVED, Mode MODE>
__global__ void __launch_bounds__(THREADS, MODE == TURN ? 4 : MODE == NORM ? 3 : 2)
    rope3d(const __grid_constant__ Rope3d op, const __grid_constant__ Pack pack, int lanes) {
  using At = Place<VEC, INTERLEAVED>;
  __shared__ double turns[MAX_PAIRS];  // of a pair a position
  __shared__ double position[TOKENS][3];
  __shared__ float2 angle[TOKENS][MAX_PAIRS];  // cos, sin
  const int D = op.head_dim, pairs = D / 2, units = pairs / VEC;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = THREADS / lanes;
  const Sample* samples = pack.samples();

  for (int i = threadIdx.x; i < pairs; i += THREADS) {
    const int axis = i < op.axis_end[0] ? 0 : i < op.axis_end[1] ? 1 : 2;
    const int begin = axis ? op.axis_end[axis - 1] : 0;
    turns[i] = pow(op.theta[axis], -double(i - begin) / (op.axis_end[axis] - begin)) / sorahpc::TURN;
  }

  float dweight[MODE == NORM_BACKWARD ? 2 * K * 2 * VEC : 1] = {};
  const int64_t begin = MODE == NORM_BACKWARD ? int64_t(blockIdx.x) * op.chunk : int64_t(blockIdx.x) * TOKENS;
  const int64_t step = MODE == NORM_BACKWARD ? TOKENS : int64_t(gridDim.x) * TOKENS;
  const int64_t end = MODE == NORM_BACKWARD ? min(begin + op.chunk, op.num_tokens) : op.num_tokens;
  for (int64_t first = begin; first < end; first += step) {
    const int tokens = int(min(int64_t(TOKENS), end - first));
    if (threadIdx.x < tokens) {
      const sorahpc::Walk here(samples, pack.num_samples, op.first + first + threadIdx.x);
      const int at[] = {here.t, here.h, here.w};
      for (int a = 0; a < 3; ++a) position[threadIdx.x][a] = double(at[a]) * op.scale[a] + op.offset[a];
    }
    __syncthreads();  // positions and turns are written; the tile before is done with its angles
    for (int i = threadIdx.x; i < tokens * pairs; i += THREADS) {
      const int t = i / pairs, pair = i % pairs;
      const int axis = pair < op.axis_end[0] ? 0 : pair < op.axis_end[1] ? 1 : 2;
      float s, c;
      sorahpc::sin_cos(position[t][axis] * turns[pair], &s, &c);
      angle[t][pair] = make_float2(c, op.inverse ? -s : s);
    }
    __syncthreads();

    const int heads = int(op.qk[0].num_heads + op.qk[1].num_heads), work = tokens * heads;
    for (int item = group; item - group < work; item += groups) {  // as often for all groups of a warp: they shuffle
      const bool here = item < work;
      const int t = here ? item / heads : 0, n = here ? item % heads : 0;
      const int which = n >= op.qk[0].num_heads;
      const Heads& h = op.qk[which];
      const int64_t head = which ? n - op.qk[0].num_heads : n, token = first + t;
      const T* x = reinterpret_cast<const T*>(h.x) + token * h.token_stride + head * h.head_stride;
      T* out = reinterpret_cast<T*>(h.out) + (token * h.num_heads + head) * D;
      const float* weight = static_cast<const float*>(h.weight);

      float v[K][2 * VEC];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int j = 0; j < 2 * VEC; ++j) v[k][j] = 0;
        const int unit = lane + k * lanes;
        if (here && unit < units) load_unit<T, VEC, At::SPLIT>(v[k], x, unit, D);
      }
      if constexpr (MODE == NORM) {
        float squares = 0;
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int j = 0; j < 2 * VEC; ++j) squares += v[k][j] * v[k][j];
        const float r = 1.0f / sqrtf(group_sum(squares, lanes) / D + float(op.eps));
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int unit = lane + k * lanes;
          if (unit < units)
#pragma unroll
            for (int j = 0; j < 2 * VEC; ++j) v[k][j] *= r * __ldg(weight + At::number(unit, j, D));
        }
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int unit = lane + k * lanes;
        if (unit >= units) continue;
#pragma unroll
        for (int m = 0; m < VEC; ++m) {
          const float2 by = angle[t][At::pair(unit, m, D)];
          const float a = v[k][At::one(m)], b = v[k][At::other(m)];
          v[k][At::one(m)] = a * by.x - b * by.y;
          v[k][At::other(m)] = b * by.x + a * by.y;
        }
      }
      if constexpr (MODE == NORM_BACKWARD) {  // v is g, the gradient turned back; see cpu/rope3d.h for the formula
        const T* saved =
            reinterpret_cast<const T*>(h.saved) + token * h.saved_token_stride + head * h.saved_head_stride;
        float y[K][2 * VEC], squares = 0, dot = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int j = 0; j < 2 * VEC; ++j) y[k][j] = 0;
          const int unit = lane + k * lanes;
          if (here && unit < units) load_unit<T, VEC, At::SPLIT>(y[k], saved, unit, D);
#pragma unroll
          for (int j = 0; j < 2 * VEC; ++j) squares += y[k][j] * y[k][j];
        }
        const float r = 1.0f / sqrtf(group_sum(squares, lanes) / D + float(op.eps));
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const int unit = lane + k * lanes;
          if (unit < units)
#pragma unroll
            for (int j = 0; j < 2 * VEC; ++j) {
              const float change = v[k][j] * y[k][j] * r;
              dweight[k * 2 * VEC + j] += which ? 0.0f : change;
              dweight[(K + k) * 2 * VEC + j] += which ? change : 0.0f;
              v[k][j] *= __ldg(weight + At::number(unit, j, D));
              dot += v[k][j] * y[k][j];
            }
        }
        const float shrink = r * r * (group_sum(dot, lanes) / D);
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int j = 0; j < 2 * VEC; ++j) v[k][j] = r * (v[k][j] - y[k][j] * shrink);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int unit = lane + k * lanes;
        if (here && unit < units) store_unit<T, VEC, At::SPLIT>(out, unit, D, v[k]);
      }
    }
  }

  if constexpr (MODE == NORM_BACKWARD) {
    __shared__ float sums[2 * VEC * K * THREADS];  // a head's numbers from each group
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int unit = lane + k * lanes;
        if (unit < units)
#pragma unroll
          for (int j = 0; j < 2 * VEC; ++j)
            sums[group * D + At::number(unit, j, D)] = dweight[(which * K + k) * 2 * VEC + j];
      }
      __syncthreads();
      for (int d = threadIdx.x; d < D; d += THREADS) {
        float total = 0;
        for (int g = 0; g < groups; ++g) total += sums[g * D + d];
        static_cast<float*>(op.qk[which].dweight)[int64_t(blockIdx.x) * D + d] = total;
      }
    }
  }
}

template <typename T, int VEC, int K, bool INTERLEAVED>
cudaError_t launch(const Rope3d& op, const Pack& pack, int64_t num_chunks, cudaStream_t stream) {
  const int units = op.head_dim / 2 / VEC;
  int lanes = 1;
  while (lanes < 32 && lanes * K < units) lanes *= 2;
  if (op.backward) {
    rope3d<T, VEC, K, INTERLEAVED, NORM_BACKWARD><<<unsigned(num_chunks), THREADS, 0, stream>>>(op, pack, lanes);
    return cudaGetLastError();
  }
  const int64_t tiles = (op.num_tokens + TOKENS - 1) / TOKENS;
  const int64_t most = int64_t(sorahpc::num_multiprocessors()) * 16;
  if (most == 0) return cudaErrorInvalidDevice;
  const unsigned grid = unsigned(tiles < most ? tiles : most);
  if (op.qk[0].weight != nullptr)
    rope3d<T, VEC, K, INTERLEAVED, NORM><<<grid, THREADS, 0, stream>>>(op, pack, lanes);
  else
    rope3d<T, VEC, K, INTERLEAVED, TURN><<<grid, THREADS, 0, stream>>>(op, pack, lanes);
  return cudaGetLastError();
}

template <typename T, int VEC, int K>
cudaError_t launch(const Rope3d& op, const Pack& pack, int64_t num_chunks, cudaStream_t stream) {
  return op.interleaved ? launch<T, VEC, K, true>(op, pack, num_chunks, stream)
                        : launch<T, VEC, K, false>(op, pack, num_chunks, stream);
}

// Whether vectors of `vec` numbers lie at multiples of their size everywhere, in either half of every head.
bool fits(const Rope3d& op, int vec, int item_bytes) {
  bool ok = op.head_dim / 2 % vec == 0 && op.head_dim / 2 / vec <= 32;
  for (const Heads& h : op.qk) {
    ok = ok && sorahpc::aligned(h.x, vec * item_bytes) && sorahpc::aligned(h.out, vec * item_bytes);
    ok = ok && h.token_stride % vec == 0 && h.head_stride % vec == 0;
    if (op.backward)
      ok = ok && sorahpc::aligned(h.saved, vec * item_bytes) && h.saved_token_stride % vec == 0 &&
           h.saved_head_stride % vec == 0;
  }
  return ok;
}

template <typename T>
cudaError_t launch(const Rope3d& op, const Pack& pack, int64_t num_chunks, cudaStream_t stream) {
  constexpr int WIDE = 16 / sizeof(T);
  if (fits(op, WIDE, sizeof(T))) return launch<T, WIDE, 1>(op, pack, num_chunks, stream);
  if (fits(op, WIDE / 2, sizeof(T))) return launch<T, WIDE / 2, 1>(op, pack, num_chunks, stream);
  return launch<T, 1, 4>(op, pack, num_chunks, stream);  // any head dim, any address
}

}  // namespace

// q and k of op on `stream`; samples lie in host memory and are read before the call returns, or on the device (see
// pack.cuh). num_chunks: of op.chunk tokens, for the norm's gradient. Returns a cudaError_t.
extern "C" int sorahpc_rope3d_cuda(const Rope3d* op, const Sample* samples, int64_t num_samples,
                                   const Sample* on_device, int64_t num_chunks, void* stream) {
  const Pack pack(samples, num_samples, on_device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op->dtype) {
    case sorahpc::Dtype::f16: return int(launch<__half>(*op, pack, num_chunks, on));
    case sorahpc::Dtype::bf16: return int(launch<__nv_bfloat16>(*op, pack, num_chunks, on));
    case sorahpc::Dtype::f32: return int(launch<float>(*op, pack, num_chunks, on));
    default: return int(cudaErrorInvalidValue);
  }
}
