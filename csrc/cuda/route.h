// One pass over the router's logits: scores, group-limited choice, weights, and for each tile of 64 tokens how often each
// expert was chosen, the rank of each choice among those of its expert, and the sums of the scores.
// r1mega/kernels/route.py says what each of them is. Nothing depends on the order in which threads run.
//
// A block has a tile, a warp a token at a time. Each group of experts has the same number of lanes, a power of two, and
// each lane up to V experts that follow each other, so that of two lanes the lower one has the lower experts.
#pragma once
#include "device.h"

namespace r1mega {

struct RouteArguments {
  const float* logits;  // [T, E]
  const float* bias;    // [E] or null
  int num_tokens, num_experts, top_k, num_groups, top_k_groups;
  bool softmax, normalize;
  float factor;
  int64_t* experts;         // [T, K], best first
  float* weights;           // [T, K]
  int64_t* ranks;           // [T, K], inside the tile
  int32_t* tile_counts;     // [N, E]
  float* tile_score_sums;   // [N, E], of scores divided by their token's sum
  float* chosen_scores;     // [T, K], for the backward
};

// How the experts are spread over a warp's lanes.
struct RoutePlan : RouteArguments {
  int lanes_of_group_log2, experts_of_lane;
  bool whole_pieces;  // the experts of all lanes in use can be read in 16-byte pieces
};

// An expert that may be among the best K. Greater orders come first: the key, and the lower expert of equal keys.
struct alignas(16) Candidate {
  uint64_t order;
  float score;

  __device__ int expert() const { return int(~unsigned(order)); }
};

__device__ inline Candidate candidate(unsigned key, int expert, float score) {
  return {uint64_t(key) << 32 | ~unsigned(expert), score};
}

template <int V>
struct RouteShape {
  static constexpr int kExperts = smaller(kWarpSize * V, kMaxExperts);
  static constexpr int kWarps = V <= 8 ? 32 : 16;  // with more registers a thread there are fewer of them
  static constexpr int kThreads = kWarps * kWarpSize;
};

template <int V>
struct RouteShared {
  unsigned tokens_of_expert[RouteShape<V>::kExperts][kTileTokens / 32];  // a bit for each token that chose the expert
  int16_t chosen[kTileTokens][kMaxTopK];
  union {  // first one, then the other
    Candidate candidates[RouteShape<V>::kWarps][kWarpSize];
    float score_sums[RouteShape<V>::kWarps][RouteShape<V>::kExperts];
  };
};

// The experts of one lane.
struct LaneExperts {
  int first, count;
};

__device__ inline LaneExperts experts_of(int lane, const RoutePlan& a) {
  const int lanes = 1 << a.lanes_of_group_log2, size = a.num_experts / a.num_groups;
  const int group = lane / lanes, before = lane % lanes * a.experts_of_lane;
  if (group >= a.num_groups || before >= size) return {0, 0};
  return {group * size + before, smaller(a.experts_of_lane, size - before)};
}

template <int V>
__device__ inline void load(const float* from, LaneExperts mine, bool whole_pieces, float (&to)[V]) {
  if constexpr (V % 4 == 0) {
    if (whole_pieces) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        const float4* at = reinterpret_cast<const float4*>(from + mine.first + v);
        const float4 piece = v < mine.count ? *at : float4{0.f, 0.f, 0.f, 0.f};
        to[v] = piece.x;
        to[v + 1] = piece.y;
        to[v + 2] = piece.z;
        to[v + 3] = piece.w;
      }
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = v < mine.count ? from[mine.first + v] : 0.f;
}

// Below this, 1 + exp(-logit) may be out of the range of reciprocal().
constexpr float kLowestLogit = -80.f;

template <int V>
__device__ inline void sigmoid(float (&x)[V]) {
  bool ordinary = true;  // neither very low nor NaN
#pragma unroll
  for (int v = 0; v < V; ++v) ordinary &= x[v] > kLowestLogit;
  if (__ballot_sync(kWholeWarp, ordinary) == kWholeWarp) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = reciprocal(1.f + expf(-x[v]));
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = 1.f / (1.f + expf(-x[v]));
  }
}

// Logits to scores, in place; the exponential and the quotient are those of torch.sigmoid and torch.softmax.
// Returns the sum of the token's scores.
template <int V>
__device__ inline float make_scores(float (&x)[V], int count, bool softmax) {
  float sum = 0.f;
  if (!softmax) {
    sigmoid(x);
#pragma unroll
    for (int v = 0; v < V; ++v) sum += v < count ? x[v] : 0.f;
    return warp_sum(sum);
  }
  unsigned key = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) key = greater(key, v < count ? key_of(x[v]) : 0u);
  const float greatest = value_of(__reduce_max_sync(kWholeWarp, key));
#pragma unroll
  for (int v = 0; v < V; ++v) {
    x[v] = expf(x[v] - greatest);
    sum += v < count ? x[v] : 0.f;
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = x[v] / sum;
  return 1.f;
}

// The keys of the experts' values; 0 where the lane has no expert. The bias is read for each token: it stays in the
// cache, and as many registers are free.
template <int V>
__device__ inline void make_keys(const float (&scores)[V], LaneExperts mine, const RoutePlan& a, unsigned (&keys)[V]) {
  float bias[V] = {};
  if (a.bias) load(a.bias, mine, a.whole_pieces, bias);
#pragma unroll
  for (int v = 0; v < V; ++v) keys[v] = v < mine.count ? key_of(a.bias ? scores[v] + bias[v] : scores[v]) : 0;
}

// How many groups are better than the lane's. The lanes of a group share the others.
__device__ inline int better_groups(unsigned mine, int lane, const RoutePlan& a) {
  const int lanes = 1 << a.lanes_of_group_log2, group = lane / lanes;
  int better = 0;
  for (int first = 0; first < a.num_groups; first += lanes) {
    const int other = first + lane % lanes;
    const unsigned key = __shfl_sync(kWholeWarp, mine, other * lanes);
    better += other < a.num_groups && (key > mine || (key == mine && other < group));
  }
  for (int step = 1; step < lanes; step *= 2) better += __shfl_xor_sync(kWholeWarp, better, step);
  return better;
}

// Leaves only the experts of the best groups; a group's value is the sum of its two best experts' values.
template <int V>
__device__ inline void leave_out_groups(unsigned (&keys)[V], int lane, const RoutePlan& a) {
  unsigned first = 0, second = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    second = greater(second, smaller(first, keys[v]));
    first = greater(first, keys[v]);
  }
  for (int step = 1; step < 1 << a.lanes_of_group_log2; step *= 2) {
    const unsigned other_first = __shfl_xor_sync(kWholeWarp, first, step);
    const unsigned other_second = __shfl_xor_sync(kWholeWarp, second, step);
    second = greater(greater(second, other_second), smaller(first, other_first));
    first = greater(first, other_first);
  }
  float value = value_of(first);
  if (a.num_experts > a.num_groups) value += value_of(second);
  if (better_groups(key_of(value), lane, a) < a.top_k_groups) return;
#pragma unroll
  for (int v = 0; v < V; ++v) keys[v] = keys[v] ? kKeyOfMinusInfinity : 0;
}

template <int V>
__device__ inline unsigned greatest_of(const unsigned (&keys)[V]) {
  unsigned greatest = keys[0];
#pragma unroll
  for (int v = 1; v < V; ++v) greatest = greater(greatest, keys[v]);
  return greatest;
}

// The best K experts one after the other: right for any keys, but each one costs a look at all of a lane's keys.
template <int V>
__device__ inline void choose_one_by_one(unsigned (&keys)[V], const float (&scores)[V], int first_expert, int lane,
                                         int top_k, Candidate* chosen) {
  unsigned best = greatest_of(keys);
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    const unsigned greatest = __reduce_max_sync(kWholeWarp, best);
    const int winner = __ffs(__ballot_sync(kWholeWarp, best == greatest)) - 1;
    if (lane != winner) continue;
    bool found = false;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (found || keys[v] != greatest) continue;
      found = true;
      keys[v] = 0;
      chosen[k] = candidate(greatest, first_expert + v, scores[v]);
    }
    best = greatest_of(keys);
  }
}

// Puts the best K experts into chosen[0] to chosen[K - 1], best first. All K are at least as great as the K-th greatest
// of the lanes' own greatest keys, and few others are: so these few are collected, one a lane, and each counts how many
// are better.
template <int V>
__device__ inline void choose(unsigned (&keys)[V], const float (&scores)[V], int first_expert, int lane, int top_k,
                              Candidate* chosen) {
  unsigned rest = greatest_of(keys), threshold = 0;
  for (int k = 0; k < top_k; ++k) {
    threshold = __reduce_max_sync(kWholeWarp, rest);
    if (rest == threshold) rest = 0;
  }
  threshold = greater(threshold, 1u);  // no expert has key 0
  unsigned fits = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) fits |= unsigned(keys[v] >= threshold) << v;
  const int up_to_here = sum_up_to(__popc(fits), lane), count = __shfl_sync(kWholeWarp, up_to_here, kWarpSize - 1);
  if (count > kWarpSize) {  // many equal keys
    choose_one_by_one(keys, scores, first_expert, lane, top_k, chosen);
    __syncwarp();
    return;
  }
  int place = up_to_here - __popc(fits);
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (fits >> v & 1) chosen[place++] = candidate(keys[v], first_expert + v, scores[v]);
  __syncwarp();
  const Candidate mine = chosen[lane];
  int better = 0;
  for (int other = 0; other < count; ++other) better += chosen[other].order > mine.order;
  __syncwarp();
  if (lane < count && better < top_k) chosen[better] = mine;
  __syncwarp();
}

// The choices of a tile: counts of each expert and the rank of each choice, in the order of the tokens.
template <int V>
__device__ inline void rank_choices(const RouteShared<V>& shared, const RoutePlan& a) {
  for (int expert = threadIdx.x; expert < a.num_experts; expert += RouteShape<V>::kThreads) {
    const unsigned* tokens = shared.tokens_of_expert[expert];
    a.tile_counts[int64_t(blockIdx.x) * a.num_experts + expert] = __popc(tokens[0]) + __popc(tokens[1]);
  }
  const int first_token = blockIdx.x * kTileTokens;
  const int num_choices = smaller(kTileTokens, a.num_tokens - first_token) * a.top_k;
  for (int i = threadIdx.x; i < num_choices; i += RouteShape<V>::kThreads) {
    const int slot = i / a.top_k;
    const unsigned* tokens = shared.tokens_of_expert[shared.chosen[slot][i % a.top_k]];
    const unsigned earlier = (1u << slot % 32) - 1;
    a.ranks[int64_t(first_token) * a.top_k + i] =
        slot < 32 ? __popc(tokens[0] & earlier) : __popc(tokens[0]) + __popc(tokens[1] & earlier);
  }
}

template <int V>
__device__ inline void add_score_sums(const RouteShared<V>& shared, const RoutePlan& a) {
  for (int expert = threadIdx.x; expert < a.num_experts; expert += RouteShape<V>::kThreads) {
    float sum = 0.f;
    for (int warp = 0; warp < RouteShape<V>::kWarps; ++warp) sum += shared.score_sums[warp][expert];
    a.tile_score_sums[int64_t(blockIdx.x) * a.num_experts + expert] = sum;
  }
}

// Lane k writes the k-th choice.
template <int V>
__device__ inline void write_choice(RouteShared<V>& shared, const Candidate* chosen, int slot, int64_t token, int lane,
                                    const RoutePlan& a) {
  const bool writes = lane < a.top_k;
  const float score = writes ? chosen[lane].score : 0.f;
  const float sum = a.normalize ? warp_sum(score) + 1e-20f : 1.f;
  if (!writes) return;
  const int expert = chosen[lane].expert();
  a.experts[token * a.top_k + lane] = expert;
  a.weights[token * a.top_k + lane] = score / sum * a.factor;
  a.chosen_scores[token * a.top_k + lane] = score;
  shared.chosen[slot][lane] = int16_t(expert);
  atomicOr(&shared.tokens_of_expert[expert][slot / 32], 1u << slot % 32);
}

template <int V>
__global__ void __launch_bounds__(RouteShape<V>::kThreads) route_kernel(RoutePlan a) {
  constexpr int kWarps = RouteShape<V>::kWarps;
  RouteShared<V>& shared = shared_memory<RouteShared<V>>();
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int expert = threadIdx.x; expert < a.num_experts; expert += RouteShape<V>::kThreads)
    shared.tokens_of_expert[expert][0] = shared.tokens_of_expert[expert][1] = 0;
  __syncthreads();

  const LaneExperts mine = experts_of(lane, a);
  float score_sums[V] = {};
  for (int slot = warp; slot < kTileTokens; slot += kWarps) {
    const int64_t token = int64_t(blockIdx.x) * kTileTokens + slot;
    if (token >= a.num_tokens) break;
    float scores[V];
    unsigned keys[V];
    load(a.logits + token * a.num_experts, mine, a.whole_pieces, scores);
    const float scale = reciprocal(make_scores(scores, mine.count, a.softmax) + 1e-20f);
#pragma unroll
    for (int v = 0; v < V; ++v) score_sums[v] += scores[v] * scale;
    make_keys(scores, mine, a, keys);
    if (a.num_groups > 1) leave_out_groups(keys, lane, a);
    choose(keys, scores, mine.first, lane, a.top_k, shared.candidates[warp]);
    write_choice(shared, shared.candidates[warp], slot, token, lane, a);
    __syncwarp();
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; ++v)
    if (v < mine.count) shared.score_sums[warp][mine.first + v] = score_sums[v];
  __syncthreads();
  rank_choices(shared, a);
  add_score_sums(shared, a);
}

template <int V>
cudaError_t launch_route(const RoutePlan& a, void* stream) {
  const int num_tiles = (a.num_tokens + kTileTokens - 1) / kTileTokens;
  return R1MEGA_LAUNCH(route_kernel<V>, dim3(num_tiles), dim3(RouteShape<V>::kThreads), stream, a);
}

// Spreads the experts over the lanes and takes the kernel with the fewest experts a lane that fits.
inline cudaError_t route(const RouteArguments& given, void* stream) {
  RoutePlan a;
  static_cast<RouteArguments&>(a) = given;
  if (a.num_experts <= 0 || a.num_experts > kMaxExperts || a.num_groups <= 0 || a.num_groups > kMaxGroups ||
      a.num_experts % a.num_groups || a.top_k <= 0 || a.top_k > kMaxTopK || a.top_k > a.num_experts)
    return cudaErrorInvalidValue;
  if (a.num_tokens == 0) return cudaSuccess;
  if (a.top_k_groups >= a.num_groups) a.num_groups = 1;
  a.lanes_of_group_log2 = 0;
  while (a.num_groups << (a.lanes_of_group_log2 + 1) <= kWarpSize) ++a.lanes_of_group_log2;
  const int size = a.num_experts / a.num_groups, lanes = 1 << a.lanes_of_group_log2;
  a.experts_of_lane = (size + lanes - 1) / lanes;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.logits) | reinterpret_cast<uintptr_t>(a.bias);
  a.whole_pieces = a.experts_of_lane % 4 == 0 && size % 4 == 0 && addresses % 16 == 0;
  if (a.experts_of_lane <= 2) return launch_route<2>(a, stream);
  if (a.experts_of_lane <= 4) return launch_route<4>(a, stream);
  if (a.experts_of_lane <= 8) return launch_route<8>(a, stream);
  if (a.experts_of_lane <= 12) return launch_route<12>(a, stream);
  return launch_route<24>(a, stream);
}

}  // namespace r1mega
