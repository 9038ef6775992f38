// Vectors of numbers in memory and as float, for the CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace sorahpc {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
__device__ __forceinline__ void put(T* p, float x) {
  *p = from_float<T>(x);
}

// N numbers that one instruction moves; the address must be a multiple of their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Numbers {
  T x[N];
};

template <int N, typename T>
__device__ __forceinline__ void load(const T* p, float (&x)[N]) {
  const Numbers<T, N> v = *reinterpret_cast<const Numbers<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(v.x[i]);
}

// x is left as it was stored.
template <int N, typename T>
__device__ __forceinline__ void store(T* p, float (&x)[N]) {
  Numbers<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v.x[i] = from_float<T>(x[i]);
    x[i] = to_float(v.x[i]);
  }
  *reinterpret_cast<Numbers<T, N>*>(p) = v;
}

constexpr double TURN = 6.28318530717958647692;

// Sine and cosine of so many turns, at most twice as far from the truth as the nearest float: sincospif, which takes a
// float, is four times. Cephes' polynomials (Moshier 1989) on an eighth of a turn, the first terms in double.
__device__ __forceinline__ void sin_cos(double turns, float* s, float* c) {
  const double quarters = 4.0 * (turns - rint(turns)), whole = rint(quarters);
  const double x = (quarters - whole) * 1.57079632679489661923;
  const float y = float(x), z = y * y;
  const float third = y * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float fourth = z * z * (4.166664568e-2f - z * (1.388731625e-3f - z * 2.443315712e-5f));
  const float sine = float(x + double(third)), cosine = float(1.0 - 0.5 * x * x + double(fourth));
  const int q = int(whole);
  const float a = q & 1 ? cosine : sine, b = q & 1 ? sine : cosine;
  *s = q & 2 ? -a : a;
  *c = (q + 1) & 2 ? -b : b;
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// What a grid of persistent blocks is sized by; 0 and an error where the device does not answer.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

}  // namespace sorahpc
