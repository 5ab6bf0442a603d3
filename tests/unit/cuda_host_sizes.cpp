// Runs the kernels of csrc/cuda at many sizes on buffers that end where the arrays end. Meant for g++ with
// -fsanitize=address,undefined. All results start as garbage, so that one that is not written is seen.
#include "kernels.cu"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>

namespace {

using namespace r1mega;

template <class T>
std::unique_ptr<T[]> garbage(size_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  memset(static_cast<void*>(values.get()), 0xcd, count * sizeof(T));
  return values;
}

void require(bool condition, const char* what, int T, int E, int K) {
  if (condition) return;
  printf("%s is wrong at T=%d E=%d K=%d %s\n", what, T, E, K, emulation::last_error);
  exit(1);
}

void run(int T, int E, int K, int groups, int kept, bool softmax, int row_bytes, int gap, std::mt19937& random) {
  const int N = std::max(1, (T + kTileTokens - 1) / kTileTokens);
  const size_t choices = size_t(T) * K;
  std::normal_distribution<float> normal;
  auto logits = garbage<float>(size_t(T) * E), bias = garbage<float>(E);
  for (size_t i = 0; i < size_t(T) * E; ++i) logits[i] = normal(random);
  for (int e = 0; e < E; ++e) bias[e] = normal(random);
  auto experts = garbage<int64_t>(choices), ranks = garbage<int64_t>(choices), map = garbage<int64_t>(choices);
  auto weights = garbage<float>(choices), scores = garbage<float>(choices), grad = garbage<float>(size_t(T) * E);
  auto counts = std::unique_ptr<int32_t[]>(new int32_t[N * E]());
  auto sums = std::unique_ptr<float[]>(new float[N * E]());
  RouteArguments route{logits.get(), bias.get(), T, E, K, groups, kept, softmax, true, 2.5f, experts.get(),
                       weights.get(), ranks.get(), counts.get(), sums.get(), scores.get()};
  require(r1mega_route(&route, nullptr) == cudaSuccess, "route", T, E, K);

  auto first_row = garbage<int64_t>(N * E), total = garbage<int64_t>(E);
  auto total_sums = garbage<float>(E);
  ScanArguments scan{counts.get(), sums.get(), N, E, first_row.get(), total.get(), total_sums.get()};
  require(r1mega_scan(&scan, nullptr) == cudaSuccess, "scan", T, E, K);
  int64_t rows_of_all = 0;
  for (int e = 0; e < E; ++e) rows_of_all += total[e];
  require(rows_of_all == int64_t(choices), "the number of rows", T, E, K);

  auto other_ranks = garbage<int64_t>(choices);
  auto other_counts = std::unique_ptr<int32_t[]>(new int32_t[N * E]());
  RankArguments rank{experts.get(), T, E, K, other_ranks.get(), other_counts.get()};
  require(r1mega_rank(&rank, nullptr) == cudaSuccess, "rank", T, E, K);
  require(std::equal(ranks.get(), ranks.get() + choices, other_ranks.get()), "a rank", T, E, K);
  require(std::equal(counts.get(), counts.get() + N * E, other_counts.get()), "a count", T, E, K);

  const size_t step = row_bytes + gap, input_bytes = T ? T * step - gap : 0;  // nothing comes after the last row
  auto input = garbage<char>(input_bytes), rows = garbage<char>(choices * row_bytes);
  for (size_t i = 0; i < input_bytes; ++i) input[i] = char(random());
  PermuteArguments permute{input.get(), experts.get(), ranks.get(), first_row.get(), map.get(), rows.get(),
                           T, E, K, kTileTokens, int64_t(step), row_bytes};
  require(r1mega_permute(&permute, nullptr) == cudaSuccess, "permute", T, E, K);
  std::vector<bool> taken(choices);
  for (size_t i = 0; i < choices; ++i) {
    require(map[i] >= 0 && map[i] < int64_t(choices) && !taken[map[i]], "a row", T, E, K);
    taken[map[i]] = true;
    require(!memcmp(&rows[map[i] * row_bytes], &input[i / K * step], row_bytes), "a copy", T, E, K);
  }

  RouteBackwardArguments backward{weights.get(), scores.get(), experts.get(), softmax ? logits.get() : nullptr,
                                  T, E, K, softmax, true, 2.5f, grad.get()};
  require(r1mega_route_backward(&backward, nullptr) == cudaSuccess, "route backward", T, E, K);
  for (size_t i = 0; i < size_t(T) * E; ++i) require(std::fabs(grad[i]) < 1e4f, "a gradient", T, E, K);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const int sizes[][5] = {{0, 8, 2, 1, 1},    {1, 1, 1, 1, 1},     {65, 8, 8, 4, 2},   {3, 60, 4, 1, 1},
                          {70, 64, 6, 8, 3},  {5, 160, 6, 8, 3},   {67, 256, 8, 8, 4}, {4, 384, 16, 12, 4},
                          {2, 384, 16, 1, 1}, {3, 378, 16, 9, 3},  {4, 33, 16, 3, 2},  {4, 62, 3, 31, 5},
                          {3, 384, 3, 32, 5}, {2, 382, 16, 2, 1}};
  const int row_bytes[] = {1, 2, 12, 24, 16, 8208};
  int turn = 0;
  for (const auto& s : sizes) {
    for (const int gap : {0, 16}) run(s[0], s[1], s[2], s[3], s[4], turn % 2, row_bytes[turn % 6], gap, random);
    ++turn;
  }
  printf("all sizes are right\n");
}
