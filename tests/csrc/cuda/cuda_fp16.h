// float16 for the emulated kernels: see cuda_runtime.h.
#pragma once

struct __half {
  _Float16 x;
};

inline float __half2float(__half h) { return float(h.x); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
