// The CPU kernels as ops/ calls them: one table of functions for each x86-64 level that they were compiled for.
#pragma once

#include "../embed.h"
#include "../flow_patchify.h"
#include "../ada_norm.h"
#include "../pack.h"
#include "../patchify.h"
#include "../rope3d.h"

namespace sorahpc {

struct CpuKernels {
  // Moves token rows [h0, h1) of frame t of one sample, all channels; the pointers are at the sample's first element.
  // item_bytes: 2, 4 or 8; the elements are bytes to us. to_tokens: patchify, else unpatchify. scratch holds these
  // tokens, and after the last call comes stream_fence; null: written where they belong at once, through the caches.
  void (*patchify)(const Patchify* op, int item_bytes, bool to_tokens, const Sample* sample, int64_t t, int64_t h0,
                   int64_t h1, char* latent, char* tokens, char* scratch);
  // Tokens [begin, end) of op's, both of q and k. tables[axis]: see ops/rope3d.cpp.
  void (*rope3d)(const Rope3d* op, const void* const* tables, const Sample* samples, int64_t num_samples, int64_t begin,
                 int64_t end);
  void (*stream_copy)(const char* src, char* dst, int64_t bytes);
  // What this thread wrote past the caches is there before another may look. It waits for memory: once, at the end.
  void (*stream_fence)();
  // The same rows as patchify's; scratch holds their tokens twice.
  void (*flow_patchify)(const FlowPatchify* op, const Draw* draw, const Sample* sample, int64_t t, int64_t h0,
                        int64_t h1, const char* latent, char* tokens, char* target, char* scratch);
  // Tokens [begin, end). scratch: 2 M numbers of what is computed in, this thread's own.
  void (*ada_norm)(const AdaNorm* op, const Sample* samples, int64_t begin, int64_t end, void* scratch);
  // Chunks [begin, end) of op->num_chunks(). scratch: kinds() M numbers.
  void (*ada_norm_backward)(const AdaNorm* op, const Sample* samples, int64_t begin, int64_t end, void* scratch);
  // Sums [begin, end) of the num_samples * kinds, once all chunks are done.
  void (*ada_norm_sums)(const AdaNorm* op, const Sample* samples, int64_t begin, int64_t end);
  // Tokens [begin, end) of op's; table: see ops/embed.cpp.
  void (*sincos3d)(const Sincos3d* op, const void* table, const Sample* samples, int64_t num_samples, int64_t begin,
                   int64_t end);
  void (*timesteps)(const Timesteps* op, bool as_double, int64_t begin, int64_t end);
};

}  // namespace sorahpc

// Exported by kernels.cpp, under the name of its level.
#if defined(__x86_64__)
extern "C" const sorahpc::CpuKernels sorahpc_cpu_v4bf16, sorahpc_cpu_v4, sorahpc_cpu_v3;
#endif
extern "C" const sorahpc::CpuKernels sorahpc_cpu_base;
