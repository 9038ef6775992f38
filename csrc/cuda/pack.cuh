// A pack's table of samples as a kernel's argument: no copy to the device, no synchronisation, and a captured graph stays
// valid. A table too large for that is copied by ops/ and read from there; it is one launch either way.
#pragma once

#include <cuda_runtime.h>

#include "../pack.h"

namespace sorahpc {

struct Pack {
  int64_t num_samples;
  const Sample* far;
  Sample near[MAX_SAMPLES_IN_ARGUMENTS + 1];

  Pack(const Sample* host, int64_t num_samples, const Sample* on_device) : num_samples(num_samples), far(on_device) {
    if (far == nullptr)
      for (int64_t i = 0; i <= num_samples; ++i) near[i] = host[i];
  }

  __device__ const Sample* samples() const { return far != nullptr ? far : near; }
};
static_assert(sizeof(Pack) <= 3400, "kernel arguments: what is left of 4 kB is for the op's own");

}  // namespace sorahpc
