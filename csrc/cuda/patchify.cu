// patchify on CUDA: one thread a run of bytes that is contiguous on both sides, walked in the order of the destination,
// so that writes coalesce and the scattered reads are served by the cache.
#include "../patchify.h"

#include "pack.cuh"

namespace {

using sorahpc::Pack;
using sorahpc::Patchify;
using sorahpc::Sample;

constexpr int THREADS = 256;

// An element is one Word here: the widest that divides a run of pw pixels, and op.pw counts words.
template <typename Word, bool TO_TOKENS>
__global__ void __launch_bounds__(THREADS, 3)  // 3: ptxas else spills on sm_100, for a block more
    patchify(const __grid_constant__ Patchify op, const __grid_constant__ Pack pack, const Word* __restrict__ src,
             Word* __restrict__ dst) {
  const Sample* samples = pack.samples();
  const int64_t P = op.token_size(), end = samples[pack.num_samples].first_token * P;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += step) {
    const Sample s = samples[sorahpc::find_sample(samples, pack.num_samples, sorahpc::quotient(i, P))];
    const int64_t base = s.first_token * P;
    const int64_t from =
        TO_TOKENS ? op.token_to_latent(s.T, s.H, s.W, i - base) : op.latent_to_token(s.T, s.H, s.W, i - base);
    dst[i] = src[base + from];
  }
}

template <typename Word>
cudaError_t launch(const Patchify& op, const Pack& pack, int64_t num_tokens, bool to_tokens, const void* src, void* dst,
                   cudaStream_t stream) {
  const int64_t blocks = (num_tokens * op.token_size() + THREADS - 1) / THREADS;
  const unsigned grid = unsigned(blocks < (int64_t(1) << 30) ? blocks : int64_t(1) << 30);
  const Word* from = static_cast<const Word*>(src);
  Word* to = static_cast<Word*>(dst);
  if (to_tokens)
    patchify<Word, true><<<grid, THREADS, 0, stream>>>(op, pack, from, to);
  else
    patchify<Word, false><<<grid, THREADS, 0, stream>>>(op, pack, from, to);
  return cudaGetLastError();
}

}  // namespace

extern "C" int sorahpc_patchify_cuda(const Patchify* op, int item_bytes, bool to_tokens, const Sample* samples,
                                     int64_t num_samples, const Sample* on_device, char* latents, char* tokens,
                                     void* stream) {
  // The widest word that divides a run. Samples begin at multiples of P elements, rows at multiples of pw: the bases
  // of both tensors decide the rest.
  int word = item_bytes;
  const int64_t run = (op->channels_last ? 1 : op->pw) * item_bytes;
  const uintptr_t bases = reinterpret_cast<uintptr_t>(latents) | reinterpret_cast<uintptr_t>(tokens);
  while (word < 16 && run % (2 * word) == 0 && bases % (2 * word) == 0) word *= 2;

  Patchify in_words = *op;
  in_words.pw = op->pw * item_bytes / word;
  const Pack pack(samples, num_samples, on_device);
  const int64_t num_tokens = samples[num_samples].first_token;
  const char* src = to_tokens ? latents : tokens;
  char* dst = to_tokens ? tokens : latents;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (word) {
    case 2: return int(launch<uint16_t>(in_words, pack, num_tokens, to_tokens, src, dst, on));
    case 4: return int(launch<uint32_t>(in_words, pack, num_tokens, to_tokens, src, dst, on));
    case 8: return int(launch<uint2>(in_words, pack, num_tokens, to_tokens, src, dst, on));
    case 16: return int(launch<uint4>(in_words, pack, num_tokens, to_tokens, src, dst, on));
    default: return int(cudaErrorInvalidValue);
  }
}
