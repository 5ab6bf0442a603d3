// Copies each token's row to the rows of its choices. Where a choice goes is computed here: no map is read.
// A warp has a part of a token's row: it reads each piece once and writes it K times.
#pragma once
#include "device.h"

namespace r1mega {

struct PermuteArguments {
  const void* input;         // [T, row_bytes], row t input_step * t bytes after the first
  const int64_t* experts;    // [T, K]; E marks a dropped choice. Null: the map is given
  const int64_t* ranks;      // [T, K], inside the tile
  const int64_t* first_row;  // [N, E]
  int64_t* row_of_choice;    // [T, K], written, or read where the map is given; -1 for a dropped choice
  void* rows;                // [R, row_bytes]
  int num_tokens, num_experts, top_k, tile_tokens;
  int64_t input_step, row_bytes;
};

constexpr int kMaxCopies = kWarpSize;
constexpr int kPermuteWarps = 8;
constexpr int kPiecesAtATime = 4;                              // loads under way together, for each lane
constexpr int kPiecesOfWarp = 2 * kPiecesAtATime * kWarpSize;  // of one row

// Lane k gets the row of the token's k-th choice.
__device__ inline int64_t row_of(int64_t choice, int64_t token, const PermuteArguments& a) {
  if (!a.experts) return a.row_of_choice[choice];
  const int64_t expert = a.experts[choice];
  if (expert == a.num_experts) return -1;
  const int tile = int(token) / a.tile_tokens;
  return a.first_row[int64_t(tile) * a.num_experts + expert] + a.ranks[choice];
}

template <class Piece>
__global__ void __launch_bounds__(kPermuteWarps* kWarpSize) permute_kernel(PermuteArguments a) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = int64_t(blockIdx.x) * kPermuteWarps + threadIdx.x / kWarpSize;
  if (token >= a.num_tokens) return;
  int64_t row = -1;
  if (lane < a.top_k) {
    row = row_of(token * a.top_k + lane, token, a);
    if (a.experts && blockIdx.y == 0) a.row_of_choice[token * a.top_k + lane] = row;
  }
  const int64_t pieces = a.row_bytes / sizeof(Piece), first = int64_t(blockIdx.y) * kPiecesOfWarp;
  const int64_t last = smaller(first + kPiecesOfWarp, pieces);
  const Piece* input = static_cast<const Piece*>(a.input) + token * (a.input_step / int64_t(sizeof(Piece)));
  for (int64_t start = first + lane; start - lane < last; start += kPiecesAtATime * kWarpSize) {
    Piece piece[kPiecesAtATime];
#pragma unroll
    for (int i = 0; i < kPiecesAtATime; ++i)
      if (start + i * kWarpSize < last) piece[i] = input[start + i * kWarpSize];
    for (int k = 0; k < a.top_k; ++k) {
      const int64_t to = __shfl_sync(kWholeWarp, row, k);
      if (to < 0) continue;
      Piece* out = static_cast<Piece*>(a.rows) + to * pieces;
#pragma unroll
      for (int i = 0; i < kPiecesAtATime; ++i)
        if (start + i * kWarpSize < last) out[start + i * kWarpSize] = piece[i];
    }
  }
}

template <class Piece>
cudaError_t launch_permute(const PermuteArguments& a, void* stream) {
  const int64_t pieces = a.row_bytes / sizeof(Piece);
  const unsigned parts = unsigned(greater<int64_t>(1, (pieces + kPiecesOfWarp - 1) / kPiecesOfWarp));
  const unsigned blocks = unsigned((int64_t(a.num_tokens) + kPermuteWarps - 1) / kPermuteWarps);
  return R1MEGA_LAUNCH(permute_kernel<Piece>, dim3(blocks, parts), dim3(kPermuteWarps * kWarpSize), stream, a);
}

// In the largest pieces that rows, the steps between them and pointers are multiples of.
inline cudaError_t permute(const PermuteArguments& a, void* stream) {
  if (a.top_k <= 0 || a.top_k > kMaxCopies || a.tile_tokens <= 0) return cudaErrorInvalidValue;
  if (a.num_tokens == 0) return cudaSuccess;
  const uintptr_t pointers = reinterpret_cast<uintptr_t>(a.input) | reinterpret_cast<uintptr_t>(a.rows);
  const uintptr_t all = pointers | a.input_step | a.row_bytes;
  if (all % 16 == 0) return launch_permute<uint4>(a, stream);
  if (all % 8 == 0) return launch_permute<uint64_t>(a, stream);
  if (all % 4 == 0) return launch_permute<uint32_t>(a, stream);
  if (all % 2 == 0) return launch_permute<uint16_t>(a, stream);
  return launch_permute<uint8_t>(a, stream);
}

}  // namespace r1mega
