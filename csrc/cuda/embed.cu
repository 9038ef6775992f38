// Sinusoidal embeddings on CUDA. No tables: a thread keeps one sine and its cosine while it walks down the tokens, and
// makes new ones where its axis's index changes.
#include "../embed.h"

#include "number.cuh"
#include "pack.cuh"

namespace {

using sorahpc::Pack;
using sorahpc::put;
using sorahpc::Sample;
using sorahpc::Sincos3d;
using sorahpc::to_float;
using sorahpc::Walk;

constexpr int THREADS = 128, CHUNK = 32;  // columns a block, tokens a thread

template <typename T>
__global__ void __launch_bounds__(THREADS)
    sincos3d(const __grid_constant__ Sincos3d op, const __grid_constant__ Pack pack) {
  const int column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= 3 * op.half) return;
  const int axis = column / op.half, i = column % op.half;
  const double frequency = pow(op.theta, -double(i) / double(op.half)) / sorahpc::TURN;
  const Sample* samples = pack.samples();
  for (int64_t begin = int64_t(blockIdx.x) * CHUNK; begin < op.num_tokens; begin += int64_t(gridDim.x) * CHUNK) {
    const int64_t end = begin + CHUNK < op.num_tokens ? begin + CHUNK : op.num_tokens;
    Walk walk(samples, pack.num_samples, op.first + begin);
    int now = -1;
    float sine = 0, cosine = 0;
    for (int64_t token = begin; token < end; ++token, walk.next()) {
      const int at = axis == 0 ? walk.t : axis == 1 ? walk.h : walk.w;
      if (at != now) sorahpc::sin_cos(double(at) * frequency, &sine, &cosine);
      now = at;
      const int64_t place = 2 * axis * op.half + i;
      T* out = reinterpret_cast<T*>(op.out) + token * 6 * op.half + place;
      float a = 0, b = 0;
      if (op.x != nullptr) {
        const T* x = reinterpret_cast<const T*>(op.x) + token * op.x_stride + place;
        a = to_float(x[0]), b = to_float(x[op.half]);
      }
      put(out, a + sine);
      put(out + op.half, b + cosine);
    }
  }
}

__global__ void __launch_bounds__(THREADS)
    timesteps(const float* __restrict__ t, float* __restrict__ out, int64_t num_t, int64_t half, float scale,
              double log_period) {
  const int64_t step = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < num_t * half; i += step) {
    const int64_t row = i / half, j = i % half;
    const float frequency = float(exp(-log_period * double(j) / double(half)));
    float s, c;
    sorahpc::sin_cos(double(__fmul_rn(__fmul_rn(scale, t[row]), frequency)) / sorahpc::TURN, &s, &c);
    out[2 * row * half + j] = c;
    out[(2 * row + 1) * half + j] = s;
  }
}

}  // namespace

extern "C" int sorahpc_sincos3d_cuda(const Sincos3d* op, const Sample* samples, int64_t num_samples,
                                     const Sample* on_device, void* stream) {
  const Pack pack(samples, num_samples, on_device);
  const int64_t chunks = (op->num_tokens + CHUNK - 1) / CHUNK;
  const dim3 grid(unsigned(chunks < (1 << 30) ? chunks : 1 << 30), (3 * op->half + THREADS - 1) / THREADS);
  const auto on = static_cast<cudaStream_t>(stream);
  if (grid.y > 65535) return int(cudaErrorInvalidValue);
  switch (op->dtype) {
    case sorahpc::Dtype::f16: sincos3d<__half><<<grid, THREADS, 0, on>>>(*op, pack); break;
    case sorahpc::Dtype::bf16: sincos3d<__nv_bfloat16><<<grid, THREADS, 0, on>>>(*op, pack); break;
    case sorahpc::Dtype::f32: sincos3d<float><<<grid, THREADS, 0, on>>>(*op, pack); break;
    default: return int(cudaErrorInvalidValue);
  }
  return int(cudaGetLastError());
}

extern "C" int sorahpc_timesteps_cuda(const float* t, float* out, int64_t num_t, int64_t half, double scale,
                                      double max_period, void* stream) {
  const int64_t blocks = (num_t * half + THREADS - 1) / THREADS;
  timesteps<<<unsigned(blocks < (1 << 30) ? blocks : 1 << 30), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
      t, out, num_t, half, float(scale), log(max_period));
  return int(cudaGetLastError());
}
