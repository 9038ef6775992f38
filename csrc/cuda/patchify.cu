// patchify on CUDA: one thread a run of bytes that is contiguous on both sides, walked in the order of the destination,
// so that writes coalesce and the scattered reads are served by the cache. The table of samples travels as a kernel
// argument: no copy to the device, no synchronisation, and a captured graph stays valid.
#include "../patchify.h"

#include <cuda_runtime.h>

namespace {

constexpr int MAX_SAMPLES = 240;  // a launch; the table then fits the 4 kB of arguments that every driver takes
constexpr int THREADS = 256;

struct Table {
  sorahpc::Patchify op;
  int num_samples;
  int64_t first_token[MAX_SAMPLES + 1];
  int32_t H[MAX_SAMPLES], W[MAX_SAMPLES];
};
static_assert(sizeof(Table) + 64 <= 4096, "kernel arguments");

// An element is one Word here: the widest that divides a run of pw pixels, and op.pw counts words.
template <typename Word, bool TO_TOKENS>
__global__ void __launch_bounds__(THREADS)
    patchify(const __grid_constant__ Table table, const Word* __restrict__ src, Word* __restrict__ dst, int64_t begin,
             int64_t end) {
  const int64_t P = table.op.token_size();
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = begin + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += step) {
    const int s = sorahpc::find_sample(table.first_token, table.num_samples, i / P);
    const int64_t base = table.first_token[s] * P;
    const int64_t H = table.H[s], W = table.W[s];
    const int64_t T = (table.first_token[s + 1] - table.first_token[s]) / (H * W);
    const int64_t from = TO_TOKENS ? table.op.token_to_latent(T, H, W, i - base)
                                   : table.op.latent_to_token(T, H, W, i - base);
    dst[i] = src[base + from];
  }
}

template <typename Word>
cudaError_t launch(const Table& table, bool to_tokens, const void* src, void* dst, cudaStream_t stream) {
  const int64_t P = table.op.token_size();
  const int64_t begin = table.first_token[0] * P, end = table.first_token[table.num_samples] * P;
  const int64_t blocks = (end - begin + THREADS - 1) / THREADS;
  const unsigned grid = unsigned(blocks < (int64_t(1) << 30) ? blocks : int64_t(1) << 30);
  const Word* from = static_cast<const Word*>(src);
  Word* to = static_cast<Word*>(dst);
  if (to_tokens)
    patchify<Word, true><<<grid, THREADS, 0, stream>>>(table, from, to, begin, end);
  else
    patchify<Word, false><<<grid, THREADS, 0, stream>>>(table, from, to, begin, end);
  return cudaGetLastError();
}

}  // namespace

extern "C" int sorahpc_patchify_cuda(const sorahpc::Patchify* op, int item_bytes, bool to_tokens, const int64_t* grids,
                                     int64_t num_samples, char* latents, char* tokens, void* stream) {
  // The widest word that divides a run. Samples begin at multiples of P elements, rows at multiples of pw: the bases
  // of both tensors decide the rest.
  int word = item_bytes;
  const int64_t run = (op->channels_last ? 1 : op->pw) * item_bytes;
  const uintptr_t bases = reinterpret_cast<uintptr_t>(latents) | reinterpret_cast<uintptr_t>(tokens);
  while (word < 16 && run % (2 * word) == 0 && bases % (2 * word) == 0) word *= 2;

  Table table;
  table.op = *op;
  table.op.pw = op->pw * item_bytes / word;
  const char* src = to_tokens ? latents : tokens;
  char* dst = to_tokens ? tokens : latents;
  int64_t token = 0;
  for (int64_t sample = 0; sample < num_samples; sample += table.num_samples) {
    table.num_samples = int(num_samples - sample < MAX_SAMPLES ? num_samples - sample : MAX_SAMPLES);
    for (int i = 0; i < table.num_samples; ++i) {
      const int64_t* grid = grids + 3 * (sample + i);
      table.first_token[i] = token;
      table.H[i] = int32_t(grid[1]);
      table.W[i] = int32_t(grid[2]);
      token += grid[0] * grid[1] * grid[2];
    }
    table.first_token[table.num_samples] = token;
    cudaError_t error = cudaSuccess;
    switch (word) {
      case 2: error = launch<uint16_t>(table, to_tokens, src, dst, static_cast<cudaStream_t>(stream)); break;
      case 4: error = launch<uint32_t>(table, to_tokens, src, dst, static_cast<cudaStream_t>(stream)); break;
      case 8: error = launch<uint2>(table, to_tokens, src, dst, static_cast<cudaStream_t>(stream)); break;
      case 16: error = launch<uint4>(table, to_tokens, src, dst, static_cast<cudaStream_t>(stream)); break;
      default: return int(cudaErrorInvalidValue);
    }
    if (error != cudaSuccess) return int(error);
  }
  return int(cudaSuccess);
}
