// CUDA on the CPU, as much of it as csrc/cuda/ uses: `make emulate` compiles the kernels against this instead of NVIDIA's
// headers, so that they can be tested where there is no GPU, and under AddressSanitizer and UBSan.
//
// A block's threads are fibers. Each runs until it waits for others, at a barrier or a shuffle, or ends; blocks follow
// one another. Warps, and threads in a warp, take turns in an order that SORAHPC_EMULATED_ORDER draws (a number; 0: as
// they are numbered): results that depend on it tell of a missing barrier. Not emulated: speed, and memory that several
// blocks write at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // a block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

namespace emulated {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr unsigned WARP = 32;
constexpr int MAX_SHARED_BYTES = 227 << 10;  // an H100's

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

#if !defined(__x86_64__)
#error "the emulated kernels switch stacks by instructions of x86-64"
#endif

// Goes on where `to` was left, and keeps in `from` where this is left. swapcontext does the same in a microsecond, for
// the signals' sake, and a test comes here ten million times.
__attribute__((naked, noinline)) inline void switch_stack(void** from, void** to) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}

struct Fiber {
  void* left_at = nullptr;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  unsigned thread = 0;
  bool done = false;
  long barriers = 0, shuffles = 0;  // that it has come to
};

// The running block: one for the process, since what is __shared__ is static.
struct Block {
  dim3 threadIdx, blockIdx, blockDim, gridDim;
  std::vector<Fiber> fibers;
  unsigned num_threads = 0;
  std::vector<float> shuffled;  // [2, threads]: what lanes give, of this shuffle and of the one before
  std::vector<long> shuffles;   // of each warp, that all its lanes have come to
  long barriers = 0;
  std::unique_ptr<char[]> shared;
  void* scheduler = nullptr;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  Fiber* now = nullptr;
};

inline Block block;

// AddressSanitizer has to know which stack is the current one.
inline void leave(void** fake, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#else
  (void)fake, (void)stack, (void)bytes;
#endif
}
inline void arrive(void* fake, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, stack, bytes);
#else
  (void)fake, (void)stack, (void)bytes;
#endif
}

inline void resume(Fiber& fiber) {
  block.now = &fiber;
  block.threadIdx = dim3(fiber.thread, 0, 0);
  leave(&block.scheduler_fake, fiber.stack.get(), STACK_BYTES);
  switch_stack(&block.scheduler, &fiber.left_at);
  arrive(block.scheduler_fake, nullptr, nullptr);
}

inline void yield() {
  Fiber& fiber = *block.now;
  leave(fiber.done ? nullptr : &fiber.fake_stack, block.scheduler_stack, block.scheduler_bytes);
  switch_stack(&fiber.left_at, &block.scheduler);
  arrive(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_bytes);
}

inline void run_thread() {
  arrive(nullptr, &block.scheduler_stack, &block.scheduler_bytes);
  block.body(block.argument);
  block.now->done = true;
  yield();
}

// Whether all threads of [begin, end) that still run have come to where `count` says.
inline bool all_at(long Fiber::*count, long number, unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i)
    if (!block.fibers[i].done && block.fibers[i].*count < number) return false;
  return true;
}

// `reached`: the last number that all have come to, so that not each of them looks at all.
inline void wait(long Fiber::*count, unsigned begin, unsigned end, long& reached) {
  const long number = ++(block.now->*count);
  while (reached < number && !all_at(count, number, begin, end)) yield();
  reached = std::max(reached, number);
}

inline void launch_block(const std::vector<unsigned>& order) {
  block.barriers = 0;
  block.shuffles.assign((block.num_threads + WARP - 1) / WARP, 0);
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread = i, fiber.done = false, fiber.barriers = fiber.shuffles = 0, fiber.fake_stack = nullptr;
    // As if it had been left at the beginning of run_thread: six registers, and where to go.
    void** const top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack.get() + STACK_BYTES) / 16 * 16);
    top[-2] = reinterpret_cast<void*>(&run_thread);
    fiber.left_at = top - 8;
  }
  // A warp goes as far as it can before the next has its turn: a barrier that is missing is then passed by a warp that is
  // far ahead of others.
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned i = 0; i < order.size(); i += WARP)
      for (bool more = true; more; progress |= more) {
        more = false;
        for (unsigned j = i; j < std::min(i + WARP, unsigned(order.size())); ++j) {
          Fiber& fiber = block.fibers[order[j]];
          if (fiber.done) continue;
          const long before = fiber.barriers + fiber.shuffles;
          resume(fiber);
          more |= fiber.done || fiber.barriers + fiber.shuffles != before;
        }
      }
  }
  for (unsigned i : order)
    if (!block.fibers[i].done) fail("threads wait for others that don't come");
}

// Warps in another order, and the threads within each.
inline void shuffle_warps(std::vector<unsigned>& order, std::mt19937& random) {
  std::vector<unsigned> warps((order.size() + WARP - 1) / WARP);
  std::iota(warps.begin(), warps.end(), 0u);
  if (order.size() % WARP == 0) std::shuffle(warps.begin(), warps.end(), random);
  for (size_t i = 0; i < warps.size(); ++i) {
    const auto begin = order.begin() + i * WARP, end = std::min(begin + WARP, order.end());
    std::iota(begin, end, warps[i] * WARP);
    std::shuffle(begin, end, random);
  }
}

struct Launch {
  dim3 grid, threads;
  size_t shared_bytes;
  cudaStream_t stream;
};

// The kernel's arguments are in `call`, as a launch copies them: by value.
template <typename F>
void launch(const Launch& how, F call) {
  if (how.threads.x < 1 || how.threads.x > 1024 || how.threads.y != 1 || how.threads.z != 1)
    fail("threads: 1 to 1024 of one axis");
  if (how.grid.y > 65535 || how.grid.z > 65535 || how.grid.x < 1 || how.grid.y < 1) fail("grid: out of its range");
  if (how.shared_bytes > MAX_SHARED_BYTES) fail("shared memory: more than there is");
  block.gridDim = how.grid, block.blockDim = how.threads, block.num_threads = how.threads.x;
  if (block.fibers.size() < block.num_threads) block.fibers = std::vector<Fiber>(block.num_threads);
  block.shuffled.assign(2 * block.num_threads, 0);
  block.body = [](void* f) { (*static_cast<F*>(f))(); };
  block.argument = &call;
  const char* text = std::getenv("SORAHPC_EMULATED_ORDER");
  std::mt19937 random(text == nullptr ? 0 : unsigned(std::atoi(text)));
  std::vector<unsigned> order(block.num_threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned z = 0; z < how.grid.z; ++z)
    for (unsigned y = 0; y < how.grid.y; ++y)
      for (unsigned x = 0; x < how.grid.x; ++x) {
        block.blockIdx = dim3(x, y, z);
        block.shared.reset(new char[how.shared_bytes]);  // its own size, so that AddressSanitizer sees its ends
        std::memset(block.shared.get(), 0xff, how.shared_bytes);  // NaN
        if (text != nullptr && std::strcmp(text, "0") != 0) shuffle_warps(order, random);
        launch_block(order);
      }
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(block.shared.get());
}

}  // namespace emulated

#define threadIdx emulated::block.threadIdx
#define blockIdx emulated::block.blockIdx
#define blockDim emulated::block.blockDim
#define gridDim emulated::block.gridDim

inline void __syncthreads() { 
  emulated::wait(&emulated::Fiber::barriers, 0, emulated::block.num_threads, emulated::block.barriers);
}

inline float __shfl_xor_sync(unsigned mask, float x, int lane_mask) {
  using emulated::block;
  const unsigned thread = block.now->thread, warp = thread / emulated::WARP * emulated::WARP;
  if (mask != 0xffffffffu || block.num_threads < warp + emulated::WARP) emulated::fail("shuffles of whole warps only");
  float* const given = block.shuffled.data() + block.now->shuffles % 2 * block.num_threads;
  given[thread] = x;
  emulated::wait(&emulated::Fiber::shuffles, warp, warp + emulated::WARP, block.shuffles[warp / emulated::WARP]);
  const unsigned other = thread ^ unsigned(lane_mask);
  if (block.fibers[other].shuffles < block.now->shuffles) emulated::fail("a shuffle with a thread that has ended");
  return given[other];
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __fadd_rn(float a, float b) { return a + b; }  // compiled with -ffp-contract=off
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __int2float_rn(int x) { return float(x); }
using std::exp;
using std::min;
using std::pow;
using std::rint;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
template <typename F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int bytes) {
  return bytes <= emulated::MAX_SHARED_BYTES ? cudaSuccess : cudaErrorInvalidValue;
}
