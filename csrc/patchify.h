// What the CPU and the CUDA kernel of patchify share: the parameters and the index math. No torch types.
//
// A sample of grid (T,H,W) is a latent [C, T*pt, H*ph, W*pw] on one side and T*H*W tokens of P = C*pt*ph*pw elements on
// the other, (c pt ph pw) inside a token, or (pt ph pw c) if channels_last. Both sides hold the same number of
// elements, so sample i begins at element first_token[i] * P on either side: one table serves both directions.
#pragma once

#include "pack.h"

namespace sorahpc {

struct Patchify {
  int64_t channels;
  int64_t pt, ph, pw;
  bool channels_last;

  SORAHPC_HD int64_t token_size() const { return channels * pt * ph * pw; }

  // Where element (c, it, ih, iw) of a patch lies in its token.
  SORAHPC_HD int64_t in_token(int64_t c, int64_t it, int64_t ih, int64_t iw) const {
    return channels_last ? ((it * ph + ih) * pw + iw) * channels + c : ((c * pt + it) * ph + ih) * pw + iw;
  }

  // Where pixel row (c, t, h) of a sample of grid (T,H,W) begins in its latent.
  SORAHPC_HD int64_t row_in_latent(int64_t T, int64_t H, int64_t W, int64_t c, int64_t t, int64_t h) const {
    return ((c * T * pt + t) * (H * ph) + h) * (W * pw);
  }

  // Where element i of a sample's tokens lies in its latent.
  SORAHPC_HD int64_t token_to_latent(int64_t T, int64_t H, int64_t W, int64_t i) const {
    int64_t t = i, j = take_digit(t, token_size()), c = 0;
    if (channels_last) c = take_digit(j, channels);
    const int64_t iw = take_digit(j, pw), ih = take_digit(j, ph), it = take_digit(j, pt);
    if (!channels_last) c = j;
    const int64_t w = take_digit(t, W), h = take_digit(t, H);
    return row_in_latent(T, H, W, c, t * pt + it, h * ph + ih) + w * pw + iw;
  }

  // Where element i of a sample's latent lies in its tokens: the inverse.
  SORAHPC_HD int64_t latent_to_token(int64_t T, int64_t H, int64_t W, int64_t i) const {
    int64_t c = i, w = take_digit(c, W * pw), h = take_digit(c, H * ph), t = take_digit(c, T * pt);
    const int64_t iw = take_digit(w, pw), ih = take_digit(h, ph), it = take_digit(t, pt);
    return ((t * H + h) * W + w) * token_size() + in_token(c, it, ih, iw);
  }
};

}  // namespace sorahpc

// CUDA: the whole pack on `stream`; samples lie in host memory and are read before the call returns, or on the device
// (see cuda/pack.cuh). Returns a cudaError_t.
extern "C" int sorahpc_patchify_cuda(const sorahpc::Patchify* op, int item_bytes, bool to_tokens,
                                     const sorahpc::Sample* samples, int64_t num_samples,
                                     const sorahpc::Sample* on_device, char* latents, char* tokens, void* stream);
