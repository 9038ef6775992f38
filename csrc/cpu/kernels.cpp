// All CPU kernels, compiled once for each level of x86-64 (setup.py: SORAHPC_LEVEL and -march), once elsewhere.
#include "kernels.h"

#include "ada_norm.h"
#include "copy.h"
#include "embed.h"
#include "flow_patchify.h"
#include "patchify.h"
#include "rope3d.h"

#define SORAHPC_TABLE_OF(level) sorahpc_cpu_##level
#define SORAHPC_TABLE(level) SORAHPC_TABLE_OF(level)

extern "C" const sorahpc::CpuKernels SORAHPC_TABLE(SORAHPC_LEVEL) = {
    &patchify, &rope3d,            &stream_copy,   &stream_fence, &flow_patchify,
    &ada_norm, &ada_norm_backward, &ada_norm_sums, &sincos3d,     &timesteps};
