// flow_patchify on CUDA: a thread draws one block of noise, and takes the four latent elements that it is for to their
// places in the tokens.
#include "../flow_patchify.h"

#include "number.cuh"

namespace {

using sorahpc::Draw;
using sorahpc::FlowPatchify;
using sorahpc::put;
using sorahpc::Sample;
using sorahpc::to_float;

constexpr int THREADS = 256;

// The machine of ../random.h. Each operation rounds: nvcc fuses a * b + c else.
struct Machine {
  using F = float;
  using U = uint32_t;
  using I = int32_t;
  using W = uint64_t;

  static __device__ F f(float x) { return x; }
  static __device__ W w(uint64_t x) { return x; }
  static __device__ F add(F a, F b) { return __fadd_rn(a, b); }
  static __device__ F mul(F a, F b) { return __fmul_rn(a, b); }
  static __device__ F root(F x) { return __fsqrt_rn(x); }
  static __device__ F to_float(I x) { return __int2float_rn(x); }
  static __device__ U select(bool where, U a, U b) { return where ? a : b; }
  static __device__ W wide(W a, uint32_t b) { return uint64_t(uint32_t(a)) * b; }
  template <typename V, typename X>
  static __device__ V bits_as(X x) {
    static_assert(sizeof(V) == sizeof(X));
    V v;
    memcpy(&v, &x, sizeof(V));
    return v;
  }
};

// As Pack, with what the noise of each sample needs.
struct NoisedPack {
  int64_t num_samples;
  const Sample* far;
  const Draw* far_draws;
  Sample near[sorahpc::MAX_NOISED_IN_ARGUMENTS + 1];
  Draw near_draws[sorahpc::MAX_NOISED_IN_ARGUMENTS];

  __device__ const Sample* samples() const { return far != nullptr ? far : near; }
  __device__ const Draw* draws() const { return far != nullptr ? far_draws : near_draws; }
};
static_assert(sizeof(NoisedPack) + sizeof(FlowPatchify) + 3 * sizeof(void*) <= 4096, "kernel arguments");

template <typename T>
__global__ void __launch_bounds__(THREADS)
    flow_patchify(const __grid_constant__ FlowPatchify op, const __grid_constant__ NoisedPack pack,
                  const T* __restrict__ latents, T* __restrict__ tokens, T* __restrict__ target) {
  const Sample* samples = pack.samples();
  const auto& p = op.patch;
  const int64_t P = p.token_size(), num_slots = sorahpc::first_slot(samples, pack.num_samples, P);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; slot < num_slots; slot += step) {
    const int64_t i = sorahpc::sample_of_slot(samples, pack.num_samples, P, slot);
    const Sample s = samples[i];
    const Draw draw = pack.draws()[i];
    const int64_t block = slot - sorahpc::first_slot(samples, i, P), base = s.first_token * P;
    const int64_t n = (samples[i + 1].first_token - s.first_token) * P;
    if (4 * block >= n) continue;

    uint64_t c[4];
    op.stream(draw).words<Machine>(uint64_t(block), c);
    float eps[4];
    sorahpc::normals<Machine>(uint32_t(c[0]), uint32_t(c[1]), eps[0], eps[1]);
    sorahpc::normals<Machine>(uint32_t(c[2]), uint32_t(c[3]), eps[2], eps[3]);
    sorahpc::PixelWalk pixel(p, s, 4 * block);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t e = 4 * block + j;
      if (e >= n) break;
      float noised, learned;
      sorahpc::flow<Machine, float>(op.target, draw.t, to_float(latents[base + e]), eps[j], noised, learned);
      const int64_t to = base + pixel.in_tokens(p);
      put(tokens + to, noised);
      put(target + to, learned);
      pixel.next();
    }
  }
}

template <typename T>
int launch(const FlowPatchify& op, const NoisedPack& pack, int64_t num_slots, const void* latents, void* tokens,
           void* target, cudaStream_t stream) {
  const int64_t blocks = (num_slots + THREADS - 1) / THREADS;
  const unsigned grid = unsigned(blocks < (int64_t(1) << 30) ? blocks : int64_t(1) << 30);
  flow_patchify<T><<<grid, THREADS, 0, stream>>>(op, pack, static_cast<const T*>(latents), static_cast<T*>(tokens),
                                                 static_cast<T*>(target));
  return int(cudaGetLastError());
}

}  // namespace

extern "C" int sorahpc_flow_patchify_cuda(const FlowPatchify* op, const Sample* samples, const Draw* draws,
                                          int64_t num_samples, const Sample* samples_on_device,
                                          const Draw* draws_on_device, const void* latents, void* tokens, void* target,
                                          void* stream) {
  NoisedPack pack;
  pack.num_samples = num_samples, pack.far = samples_on_device, pack.far_draws = draws_on_device;
  if (samples_on_device == nullptr) {
    for (int64_t i = 0; i <= num_samples; ++i) pack.near[i] = samples[i];
    for (int64_t i = 0; i < num_samples; ++i) pack.near_draws[i] = draws[i];
  }
  const int64_t num_slots = samples[num_samples].first_token * op->patch.token_size() / 4 + num_samples;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op->dtype) {
    case sorahpc::Dtype::f16: return launch<__half>(*op, pack, num_slots, latents, tokens, target, on);
    case sorahpc::Dtype::bf16: return launch<__nv_bfloat16>(*op, pack, num_slots, latents, tokens, target, on);
    case sorahpc::Dtype::f32: return launch<float>(*op, pack, num_slots, latents, tokens, target, on);
    default: return int(cudaErrorInvalidValue);
  }
}
