// Counts of each tile and ranks inside it for choices that were made elsewhere. A block has a tile.
#pragma once
#include "tile.h"

namespace r1mega {

struct RankArguments {
  const int64_t* experts;  // [T, K]; E marks a dropped choice
  int num_tokens, num_experts, top_k;
  int64_t* ranks;        // [T, K], inside the tile; 0 for a dropped choice
  int32_t* tile_counts;  // [N, E]
};

constexpr int kRankThreads = 256;

__global__ void __launch_bounds__(kRankThreads) rank_kernel(RankArguments a) {
  auto& tile = shared_memory<Tile<kMaxExperts, kRankThreads>>();
  const int first_token = blockIdx.x * kTileTokens;
  const int num_choices = smaller(kTileTokens, a.num_tokens - first_token) * a.top_k;
  const int64_t* experts = a.experts + int64_t(first_token) * a.top_k;
  int64_t* ranks = a.ranks + int64_t(first_token) * a.top_k;
  tile.clear(a.num_experts);
  __syncthreads();
  for (int i = threadIdx.x; i < num_choices; i += kRankThreads)
    if (experts[i] < a.num_experts) tile.add(int(experts[i]), i / a.top_k);
  __syncthreads();
  for (int i = threadIdx.x; i < num_choices; i += kRankThreads)
    ranks[i] = experts[i] < a.num_experts ? tile.rank(int(experts[i]), i / a.top_k) : 0;
  tile.write_counts(a.tile_counts, a.num_experts);
}

inline cudaError_t rank(const RankArguments& a, void* stream) {
  if (a.num_experts <= 0 || a.num_experts > kMaxExperts || a.top_k <= 0) return cudaErrorInvalidValue;
  if (a.num_tokens == 0) return cudaSuccess;
  const int num_tiles = (a.num_tokens + kTileTokens - 1) / kTileTokens;
  return R1MEGA_LAUNCH(rank_kernel, dim3(num_tiles), dim3(kRankThreads), stream, a);
}

}  // namespace r1mega
