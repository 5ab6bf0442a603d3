// Which tokens of a tile chose which expert, a bit for each token. Counts and ranks follow from it, and it is the same
// in whatever order threads add to it. The experts of one token differ.
#pragma once
#include "device.h"

namespace r1mega {

template <int kExperts, int kThreads>
struct Tile {
  unsigned tokens[kExperts][kTileTokens / 32];

  __device__ void clear(int num_experts) {
    for (int expert = threadIdx.x; expert < num_experts; expert += kThreads) tokens[expert][0] = tokens[expert][1] = 0;
  }

  __device__ void add(int expert, int token) { atomicOr(&tokens[expert][token / 32], 1u << token % 32); }

  __device__ int count(int expert) const { return __popc(tokens[expert][0]) + __popc(tokens[expert][1]); }

  // Earlier tokens that chose the expert, too.
  __device__ int rank(int expert, int token) const {
    const unsigned earlier = (1u << token % 32) - 1;
    if (token < 32) return __popc(tokens[expert][0] & earlier);
    return __popc(tokens[expert][0]) + __popc(tokens[expert][1] & earlier);
  }

  __device__ void write_counts(int32_t* tile_counts, int num_experts) const {
    for (int expert = threadIdx.x; expert < num_experts; expert += kThreads)
      tile_counts[int64_t(blockIdx.x) * num_experts + expert] = count(expert);
  }
};

}  // namespace r1mega
