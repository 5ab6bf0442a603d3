// One source, two compilers: nvcc makes kernels for a GPU, g++ makes functions for tests on a machine without one, in
// which every CUDA thread is a fibre (emulation.h). Kernels use only what both have:
//
//   shared_memory<T>()             the block's one object of type T in shared memory; not initialised
//   R1MEGA_LAUNCH(kernel, grid, block, stream, arguments...)    launches, returns a cudaError_t
//   reciprocal_guess(value)        near 1 / value
//   __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync, __reduce_*_sync, atomicOr, __popc, __ffs
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace r1mega {

template <class T>
__device__ inline T& shared_memory() {
  __shared__ T memory;
  return memory;
}

__device__ inline float reciprocal_guess(float value) {
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(value));
  return guess;
}

}  // namespace r1mega

#define R1MEGA_LAUNCH(kernel, grid, block, stream, ...) \
  ((kernel)<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), cudaGetLastError())
#else
#include "emulation.h"
#endif

namespace r1mega {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kTileTokens = 64;    // tokens of a tile: ranks are counted inside it
constexpr int kMaxExperts = 384;
constexpr int kMaxTopK = 16;
constexpr int kMaxGroups = kWarpSize;

template <class T>
__device__ constexpr T smaller(T a, T b) { return a < b ? a : b; }
template <class T>
__device__ constexpr T greater(T a, T b) { return a < b ? b : a; }

// 1 / value rounded to the nearest, where neither is below 2^-126: what the compiler makes of the division, without its
// branches for other values, which would keep independent divisions from overlapping.
__device__ inline float reciprocal(float value) {
  const float guess = reciprocal_guess(value);
  return fmaf(guess, fmaf(-value, guess, 1.f), guess);
}

// The sum over the warp's lanes, the same bits in each lane and each run.
__device__ inline float warp_sum(float value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

// The sum over the lanes up to this one.
__device__ inline int sum_up_to(int value, int lane) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int lower = __shfl_up_sync(kWholeWarp, value, step);
    if (lane >= step) value += lower;
  }
  return value;
}

// An integer with the order of the value; NaN of any sign is the greatest. 0 is below the keys of all values. No value
// here is -0: scores are not negative, and a sum is -0 only where both its terms are.
__device__ inline unsigned key_of(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned key = bits ^ (unsigned(int(bits) >> 31) | 0x80000000u);
  return value == value ? key : 0xffffffffu;
}
__device__ inline float value_of(unsigned key) {
  return __uint_as_float(key ^ (~unsigned(int(key) >> 31) | 0x80000000u));
}
constexpr unsigned kKeyOfMinusInfinity = ~0xff800000u;

}  // namespace r1mega
