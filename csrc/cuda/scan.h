// The first row of each tile and expert, from the tiles' counts: rows of an expert stand together, experts in order.
// Sums the tiles' scores on the way, tile after tile, so that the sum has the same bits in every run.
//
// A block has 32 experts, one a lane, and its warps share the tiles. It counts the rows of all experts before its own
// itself, so that no block waits for another.
#pragma once
#include "device.h"

namespace r1mega {

struct ScanArguments {
  const int32_t* tile_counts;    // [N, E]
  const float* tile_score_sums;  // [N, E] or null
  int num_tiles, num_experts;
  int64_t* first_row;  // [N, E]
  int64_t* counts;     // [E]
  float* score_sums;   // [E]; null where tile_score_sums is
};

constexpr int kScanWarps = 32;

struct ScanShared {
  int before[kScanWarps];
  int counts[kScanWarps][kWarpSize];  // of a warp's tiles and an expert
  float score_sums[kScanWarps][kWarpSize];
};

__global__ void __launch_bounds__(kScanWarps* kWarpSize) scan_kernel(ScanArguments a) {
  ScanShared& shared = shared_memory<ScanShared>();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int first_expert = blockIdx.x * kWarpSize, expert = first_expert + lane;
  const bool in_use = expert < a.num_experts;

  int before = 0;
  for (int tile = warp; tile < a.num_tiles; tile += kScanWarps)
    for (int e = lane; e < first_expert; e += kWarpSize) before += a.tile_counts[int64_t(tile) * a.num_experts + e];
  before = __reduce_add_sync(kWholeWarp, before);
  if (lane == 0) shared.before[warp] = before;

  const int tiles_of_warp = (a.num_tiles + kScanWarps - 1) / kScanWarps;
  const int first_tile = warp * tiles_of_warp, last_tile = smaller(first_tile + tiles_of_warp, a.num_tiles);
  int count = 0;
  float score_sum = 0.f;
  for (int tile = first_tile; in_use && tile < last_tile; ++tile) {
    count += a.tile_counts[int64_t(tile) * a.num_experts + expert];
    if (a.score_sums) score_sum += a.tile_score_sums[int64_t(tile) * a.num_experts + expert];
  }
  shared.counts[warp][lane] = count;
  shared.score_sums[warp][lane] = score_sum;
  __syncthreads();

  int total = 0, of_earlier_tiles = 0;
  for (int other = 0; other < kScanWarps; ++other) {
    if (other == warp) of_earlier_tiles = total;
    total += shared.counts[other][lane];
  }
  const int of_earlier_blocks = __reduce_add_sync(kWholeWarp, shared.before[lane]);
  const int of_earlier_experts = sum_up_to(total, lane) - total;
  int row = of_earlier_blocks + of_earlier_experts + of_earlier_tiles;
  for (int tile = first_tile; in_use && tile < last_tile; ++tile) {
    const int64_t at = int64_t(tile) * a.num_experts + expert;
    a.first_row[at] = row;
    row += a.tile_counts[at];
  }
  if (warp > 0 || !in_use) return;
  a.counts[expert] = total;
  if (!a.score_sums) return;
  score_sum = 0.f;
  for (int other = 0; other < kScanWarps; ++other) score_sum += shared.score_sums[other][lane];
  a.score_sums[expert] = score_sum;
}

inline cudaError_t scan(const ScanArguments& a, void* stream) {
  const int num_blocks = (a.num_experts + kWarpSize - 1) / kWarpSize;
  if (num_blocks == 0) return cudaSuccess;
  return R1MEGA_LAUNCH(scan_kernel, dim3(num_blocks), dim3(kScanWarps * kWarpSize), stream, a);
}

}  // namespace r1mega
