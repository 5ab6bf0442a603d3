// The gradient of the logits from that of the weights. Of the scores only the K chosen ones are needed, and they were
// kept; weights of a softmax that are not normalised need all, and they are made again from the logits. Each gradient is
// written once, zeros included.
#pragma once
#include "device.h"

namespace r1mega {

struct RouteBackwardArguments {
  const float* grad_weights;   // [T, K]
  const float* chosen_scores;  // [T, K]
  const int64_t* experts;      // [T, K]
  const float* logits;         // [T, E]; null where the chosen scores are enough
  int num_tokens, num_experts, top_k;
  bool softmax, normalize;
  float factor;
  float* grad_logits;  // [T, E]
};

constexpr int kBackwardWarps = 8;

struct RouteBackwardShared {
  float grads[kBackwardWarps][kMaxExperts];
};

// The gradient of the k-th chosen score, in lane k; 0 in lanes without one.
__device__ inline float grad_of_score(const RouteBackwardArguments& a, int64_t choice, bool has_one, float score) {
  const float grad = has_one ? a.grad_weights[choice] : 0.f;
  if (!a.normalize) return grad * a.factor;
  const float sum = warp_sum(score) + 1e-20f;
  const float mean = warp_sum(grad * score) / sum;
  return has_one ? (grad - mean) / sum * a.factor : 0.f;
}

__global__ void __launch_bounds__(kBackwardWarps* kWarpSize) route_backward_kernel(RouteBackwardArguments a) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t token = int64_t(blockIdx.x) * kBackwardWarps + warp;
  if (token >= a.num_tokens) return;
  float* grads = shared_memory<RouteBackwardShared>().grads[warp];
  const bool has_one = lane < a.top_k;
  const int64_t choice = token * a.top_k + lane;
  const float score = has_one ? a.chosen_scores[choice] : 0.f;
  float grad = grad_of_score(a, choice, has_one, score);
  const float dot = warp_sum(grad * score);
  if (!a.logits) grad *= a.softmax ? score : score * (1.f - score);

  for (int e = lane; e < a.num_experts; e += kWarpSize) grads[e] = 0.f;
  __syncwarp();
  if (has_one) grads[a.experts[choice]] = grad;
  __syncwarp();
  float* out = a.grad_logits + token * a.num_experts;
  if (!a.logits) {
    for (int e = lane; e < a.num_experts; e += kWarpSize) out[e] = grads[e];
    return;
  }
  const float* row = a.logits + token * a.num_experts;
  unsigned key = 0;
  for (int e = lane; e < a.num_experts; e += kWarpSize) key = greater(key, key_of(row[e]));
  const float greatest = value_of(__reduce_max_sync(kWholeWarp, key));
  float sum = 0.f;
  for (int e = lane; e < a.num_experts; e += kWarpSize) sum += expf(row[e] - greatest);
  sum = warp_sum(sum);
  for (int e = lane; e < a.num_experts; e += kWarpSize) out[e] = (grads[e] - dot) * (expf(row[e] - greatest) / sum);
}

inline cudaError_t route_backward(const RouteBackwardArguments& a, void* stream) {
  if (a.num_experts > kMaxExperts || a.top_k > kMaxTopK) return cudaErrorInvalidValue;
  if (a.num_tokens == 0) return cudaSuccess;
  const int num_blocks = (a.num_tokens + kBackwardWarps - 1) / kBackwardWarps;
  return R1MEGA_LAUNCH(route_backward_kernel, dim3(num_blocks), dim3(kBackwardWarps * kWarpSize), stream, a);
}

}  // namespace r1mega
