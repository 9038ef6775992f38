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

// CUDA: how threads share a pack. A slot is a block of four elements, which one thread draws the noise for; sample i
// has slots from here on, at least as many as it has blocks.
SORAHPC_HD int64_t first_slot(const Sample* samples, int64_t i, int64_t P) {
  return samples[i].first_token * P / 4 + i;
}

SORAHPC_HD int64_t sample_of_slot(const Sample* samples, int64_t num_samples, int64_t P, int64_t slot) {
  int64_t low = 0, high = num_samples;
  while (high - low > 1) {
    const int64_t mid = (low + high) / 2;
    if (first_slot(samples, mid, P) <= slot)
      low = mid;
    else
      high = mid;
  }
  return low;
}

// CUDA: a walk over a sample's latent, pixel by pixel from element e on.
struct PixelWalk {
  int64_t grid_H, grid_W, width, height, frames;
  int64_t w, h, t, channel;

  SORAHPC_HD PixelWalk(const Patchify& p, const Sample& s, int64_t e)
      : grid_H(s.H), grid_W(s.W), width(s.W * p.pw), height(s.H * p.ph), frames(s.T * p.pt), w(take_digit(e, width)),
        h(take_digit(e, height)), t(take_digit(e, frames)), channel(e) {}

  // Where it lies in the sample's tokens.
  SORAHPC_HD int64_t in_tokens(const Patchify& p) const {
    int64_t at_t = t, at_h = h, at_w = w;
    const int64_t it = take_digit(at_t, p.pt), ih = take_digit(at_h, p.ph), iw = take_digit(at_w, p.pw);
    return ((at_t * grid_H + at_h) * grid_W + at_w) * p.token_size() + p.in_token(channel, it, ih, iw);
  }

  SORAHPC_HD void next() {
    if (++w < width) return;
    w = 0;
    if (++h < height) return;
    h = 0;
    if (++t < frames) return;
    t = 0, ++channel;
  }
};

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
