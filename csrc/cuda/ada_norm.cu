// ada_norm on CUDA. Forward: a block a row. Backward: a block a chunk of one sample's rows. Each thread has columns of
// its own for as long as a block lives, so what it keeps in shared memory needs no barrier; only a row's sums do.
// Everything is added in a fixed order: no atomics.
#include "../ada_norm.h"
#include "number.cuh"
#include "pack.cuh"

namespace {

using sorahpc::AdaNorm;
using sorahpc::Dtype;
using sorahpc::from_float;
using sorahpc::load;
using sorahpc::Pack;
using sorahpc::Rows;
using sorahpc::Sample;
using sorahpc::store;

constexpr int THREADS = 256, WARPS = THREADS / 32;
static_assert(sizeof(Pack) + sizeof(AdaNorm) <= 4096, "kernel arguments");

template <typename T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t i) {
  return rows.p == nullptr ? nullptr : reinterpret_cast<const T*>(rows.p) + i * rows.stride;
}

// a and b summed over the block, the same bits in every thread. All threads come here.
__device__ __forceinline__ float2 block_sum(float a, float b) {
  __shared__ float2 warps[WARPS];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, lane);
    b += __shfl_xor_sync(0xffffffffu, b, lane);
  }
  __syncthreads();  // what the last call left has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = make_float2(a, b);
  __syncthreads();
  float2 all = warps[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) all.x += warps[w].x, all.y += warps[w].y;
  return all;
}

// Shared memory of a row: number j of the vector at column i lies at [j * (M / VEC) + i / VEC], without bank conflicts.
template <int VEC>
__device__ __forceinline__ int at(int M, int i, int j) {
  return j * (M / VEC) + i / VEC;
}

template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS)
    forward(const __grid_constant__ AdaNorm op, const __grid_constant__ Pack pack) {
  extern __shared__ float row[];  // [M]: the sum
  const Sample* samples = pack.samples();
  const int M = int(op.M), first = int(threadIdx.x) * VEC, step = int(blockDim.x) * VEC;  // M: what shared memory holds
  for (int64_t token = blockIdx.x; token < op.num_tokens; token += gridDim.x) {
    const int64_t s = sorahpc::find_sample(samples, op.num_samples, token);
    const T *x = row_of<T>(op.x, token), *branch = row_of<T>(op.branch, token);
    const T *gate = row_of<T>(op.gate, s), *shift = row_of<T>(op.shift, s), *scale = row_of<T>(op.scale, s);
    T* sum = reinterpret_cast<T*>(op.sum) + token * M;
    T* y = reinterpret_cast<T*>(op.y) + token * M;
    float all = 0;
    for (int i = first; i < M; i += step) {
      float v[VEC];
      load<VEC>(x + i, v);
      if (branch != nullptr) {
        float b[VEC], g[VEC];
        load<VEC>(branch + i, b);
        if (gate != nullptr) load<VEC>(gate + i, g);
#pragma unroll
        for (int j = 0; j < VEC; ++j) v[j] += gate != nullptr ? g[j] * b[j] : b[j];
        store<VEC>(sum + i, v);
      }
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        row[at<VEC>(M, i, j)] = v[j];
        all += v[j];
      }
    }
    const float guess = block_sum(all, 0).x / float(M);
    float offs = 0, squares = 0;  // offs: see moments_of in cpu/ada_norm.h
    for (int i = first; i < M; i += step)
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float off = row[at<VEC>(M, i, j)] - guess;
        offs += off, squares += off * off;
      }
    const float2 both = block_sum(offs, squares);
    const float left = both.x / float(M), mean = guess + left;
    const float variance = both.y / float(M) - left * left;
    const float r = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + float(op.eps));
    if (threadIdx.x == 0) static_cast<float2*>(op.moments)[token] = make_float2(mean, r);
    for (int i = first; i < M; i += step) {
      float v[VEC], a[VEC], b[VEC];
#pragma unroll
      for (int j = 0; j < VEC; ++j) v[j] = (row[at<VEC>(M, i, j)] - mean) * r;
      if (scale != nullptr) {
        load<VEC>(scale + i, a);
        load<VEC>(shift + i, b);
#pragma unroll
        for (int j = 0; j < VEC; ++j) v[j] = v[j] * (1.0f + a[j]) + b[j];
      }
      store<VEC>(y + i, v);
    }
  }
}

// The formulas are in cpu/ada_norm.h. x and dy are read twice, the second time from L1.
template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS, 3)  // 3: ptxas else spills on sm_80, for a block more
    backward(const __grid_constant__ AdaNorm op, const __grid_constant__ Pack pack) {
  extern __shared__ float sums[];  // [kinds, M]: this chunk's
  const Sample* samples = pack.samples();
  const int M = int(op.M), first = int(threadIdx.x) * VEC, step = int(blockDim.x) * VEC;  // M: what shared memory holds
  const int kinds = op.kinds();
  float* const dgate = sums;
  float* const dshift = sums + (op.dgate != nullptr ? M : 0);
  float* const dscale = dshift + M;
  for (int64_t id = blockIdx.x; id < op.num_chunks(); id += gridDim.x) {
    int64_t begin, end;
    const int64_t s = op.tokens_of_chunk(samples, id, &begin, &end);
    if (begin >= end) continue;
    const T *gate = row_of<T>(op.gate, s), *scale = row_of<T>(op.scale, s);
    for (int kind = 0; kind < kinds; ++kind)
#pragma unroll 1
      for (int i = first; i < M; i += step)
#pragma unroll
        for (int j = 0; j < VEC; ++j) sums[kind * M + at<VEC>(M, i, j)] = 0;

    for (int64_t token = begin; token < end; ++token) {
      const T *x = row_of<T>(op.x, token), *dy = row_of<T>(op.dy, token);
      const T *dsum = row_of<T>(op.dsum, token), *branch = row_of<T>(op.branch, token);
      T* dx = reinterpret_cast<T*>(op.dx) + token * M;
      T* dbranch = reinterpret_cast<T*>(op.dbranch) + token * M;
      float v[VEC], g[VEC], a[VEC];
      const float2 moments = static_cast<const float2*>(op.moments)[token];
      const float mean = moments.x, r = moments.y;
      float g_sum = 0, gn_sum = 0;
#pragma unroll 1
      for (int i = first; i < M; i += step) {
        load<VEC>(x + i, v);
        load<VEC>(dy + i, g);
        if (scale != nullptr) load<VEC>(scale + i, a);
#pragma unroll
        for (int j = 0; j < VEC; ++j) {
          const float n = (v[j] - mean) * r;
          if (scale != nullptr) {
            dshift[at<VEC>(M, i, j)] += g[j];
            dscale[at<VEC>(M, i, j)] += g[j] * n;
            g[j] *= 1.0f + a[j];
          }
          g_sum += g[j];
          gn_sum += g[j] * n;
        }
      }
      const float2 both = block_sum(g_sum, gn_sum);
      const float g_mean = both.x / float(M), gn_mean = both.y / float(M);
#pragma unroll 1
      for (int i = first; i < M; i += step) {
        load<VEC>(x + i, v);
        load<VEC>(dy + i, g);
        if (scale != nullptr) {
          load<VEC>(scale + i, a);
#pragma unroll
          for (int j = 0; j < VEC; ++j) g[j] *= 1.0f + a[j];
        }
#pragma unroll
        for (int j = 0; j < VEC; ++j) g[j] = (g[j] - g_mean - (v[j] - mean) * r * gn_mean) * r;
        if (dsum != nullptr) {
          load<VEC>(dsum + i, a);
#pragma unroll
          for (int j = 0; j < VEC; ++j) g[j] += a[j];
        }
        if (gate != nullptr) {
          load<VEC>(branch + i, v);
          load<VEC>(gate + i, a);
#pragma unroll
          for (int j = 0; j < VEC; ++j) {
            dgate[at<VEC>(M, i, j)] += g[j] * v[j];
            a[j] *= g[j];
          }
          store<VEC>(dbranch + i, a);
        }
        store<VEC>(dx + i, g);
      }
    }
    float* const out = static_cast<float*>(op.partials) + id * kinds * M;
    for (int kind = 0; kind < kinds; ++kind)
#pragma unroll 1
      for (int i = first; i < M; i += step)
#pragma unroll
        for (int j = 0; j < VEC; ++j) out[kind * M + i + j] = sums[kind * M + at<VEC>(M, i, j)];
  }
}

// The chunks of a sample added up: 32 columns of one (sample, kind) a block, a warp every WARPS-th chunk.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    add_chunks(const __grid_constant__ AdaNorm op, const __grid_constant__ Pack pack) {
  __shared__ float parts[WARPS][32];
  const Sample* samples = pack.samples();
  const int64_t M = op.M, groups = (M + 31) / 32;
  const int kinds = op.kinds(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t block = blockIdx.x; block < op.num_samples * kinds * groups; block += gridDim.x) {
    const int64_t column = block % groups * 32 + lane, s = block / groups / kinds;
    const int kind = int(block / groups % kinds);
    const int64_t chunks = (samples[s + 1].first_token - samples[s].first_token + op.chunk - 1) / op.chunk;
    const float* from =
        static_cast<const float*>(op.partials) + (op.first_chunk(samples, s) * kinds + kind) * M + column;
    float part = 0;
    if (column < M)
      for (int64_t c = warp; c < chunks; c += WARPS) part += from[c * kinds * M];
    parts[warp][lane] = part;
    __syncthreads();
    if (warp == 0 && column < M) {
      for (int w = 1; w < WARPS; ++w) part += parts[w][lane];
      reinterpret_cast<T*>(op.sum_of(kind))[s * M + column] = from_float<T>(part);
    }
    __syncthreads();
  }
}

unsigned blocks_for(int64_t n) { return unsigned(n < (int64_t(1) << 30) ? n : int64_t(1) << 30); }

template <typename T, int VEC>
int launch(const AdaNorm& op, bool is_backward, const Pack& pack, cudaStream_t stream) {
  const auto kernel = is_backward ? backward<T, VEC> : forward<T, VEC>;
  const int64_t shared = (is_backward ? op.kinds() : 1) * op.M * int64_t(sizeof(float));
  if (shared > 32 << 10) {
    if (shared > 1 << 20) return -1;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)) != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
  }
  const int64_t vectors = (op.M / VEC + 31) / 32 * 32;
  const unsigned threads = unsigned(vectors < THREADS ? vectors : THREADS);
  const int64_t blocks = is_backward ? op.num_chunks() : op.num_tokens;
  if (blocks > 0) kernel<<<blocks_for(blocks), threads, size_t(shared), stream>>>(op, pack);
  const int64_t sums = is_backward ? op.num_samples * op.kinds() * ((op.M + 31) / 32) : 0;
  if (sums > 0) add_chunks<T><<<blocks_for(sums), THREADS, 0, stream>>>(op, pack);
  return int(cudaGetLastError());
}

template <typename T>
int launch_typed(const AdaNorm& op, bool is_backward, const Pack& pack, cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T);
  bool aligned = op.M % VEC == 0;
  for (const Rows& rows : {op.x, op.branch, op.dsum, op.dy, op.gate, op.shift, op.scale})
    aligned = aligned && (rows.p == nullptr || (reinterpret_cast<uintptr_t>(rows.p) % 16 == 0 && rows.stride % VEC == 0));
  for (const char* p : {op.sum, op.y, op.dx, op.dbranch})
    aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return aligned ? launch<T, VEC>(op, is_backward, pack, stream) : launch<T, 1>(op, is_backward, pack, stream);
}

}  // namespace

extern "C" int sorahpc_ada_norm_cuda(const AdaNorm* op, bool is_backward, const Sample* samples,
                                     const Sample* on_device, void* stream) {
  const Pack pack(samples, op->num_samples, on_device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op->dtype) {
    case Dtype::f16: return launch_typed<__half>(*op, is_backward, pack, on);
    case Dtype::bf16: return launch_typed<__nv_bfloat16>(*op, is_backward, pack, on);
    case Dtype::f32: return launch_typed<float>(*op, is_backward, pack, on);
    default: return int(cudaErrorInvalidValue);
  }
}
