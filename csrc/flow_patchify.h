// What the CPU and the CUDA kernel of flow_patchify share: patchify (see there) of x_t = (1 - t) x0 + t eps and of what
// the model is to learn, with eps drawn on the way. No torch types.
#pragma once

#include "patchify.h"
#include "random.h"

namespace sorahpc {

enum class Target : int { velocity, eps, v };

// How one sample is noised; beside the table of samples.
struct Draw {
  uint64_t id;
  uint32_t visit;
  float t;
};

struct FlowPatchify {
  Patchify patch;
  Dtype dtype;
  Target target;
  uint64_t seed;

  SORAHPC_HD Stream stream(const Draw& draw) const { return {seed, draw.id, draw.visit}; }
};

// C: float or double, M its machine.
template <typename M, typename C>
SORAHPC_HD void flow(Target target, C t, typename M::F x0, typename M::F eps, typename M::F& noised,
                     typename M::F& learned) {
  const typename M::F signal = M::mul(M::f(C(1) - t), x0), noise = M::mul(M::f(t), eps);
  noised = M::add(signal, noise);
  if (target == Target::velocity)
    learned = M::add(eps, -x0);
  else if (target == Target::eps)
    learned = eps;
  else
    learned = M::add(M::mul(M::f(C(1) - t), eps), -M::mul(M::f(t), x0));
}

// A kernel's arguments hold the tables of so many, within 4 kB.
constexpr int MAX_NOISED_IN_ARGUMENTS = 96;

}  // namespace sorahpc

// CUDA: the whole pack on `stream`. Tables lie in host memory and are read before the call returns, or both on the
// device. Returns a cudaError_t.
extern "C" int sorahpc_flow_patchify_cuda(const sorahpc::FlowPatchify* op, const sorahpc::Sample* samples,
                                          const sorahpc::Draw* draws, int64_t num_samples,
                                          const sorahpc::Sample* samples_on_device,
                                          const sorahpc::Draw* draws_on_device, const void* latents, void* tokens,
                                          void* target, void* stream);
