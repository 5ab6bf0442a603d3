// The kernels of one instruction set. kernels.cpp is compiled once for each; bind.cpp picks the best at run time.
//
// Every function works on the rows `begin` to `end` of its operation, so that threads can share them, and gives the
// same bits however they are shared. Pointers are to first elements; matrices are dense and row-major unless a stride
// (in elements) says otherwise. Shapes: T tokens, K choices a token, E experts, H hidden, F expert width, R rows.
#pragma once
#include <cstdint>

namespace r1mega {

constexpr int kMaxExperts = 4096;
constexpr int kRowsOfPartial = 128;  // rows that one partial sum of a weight gradient covers
constexpr int kLogitBlock = 2048;    // logits of a row that are looked at together; they stay in the first cache
constexpr int kPanelBytes = 256;     // of a row of the panel of columns that threads share in a matrix product

// What the gradient of the logits of K rows is made of; see r1mega/kernels/policy_tile.py. `rows` may be null: all.
template <class T>
struct RowGradients {
  const int64_t *rows, *targets;
  const T *lse, *entropy, *of_log_prob, *of_entropy;
};

// C[i][j] = (add ? C[i][j] : 0) + sum over k of A[i][k] * B[k][j]. Strides in elements; a row of C is dense, and one of
// b_depth and b_col is 1.
template <class T>
struct Product {
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth, b_col;
  T* c;
  int64_t c_row, rows, cols, depth;
  bool add;
};

struct RouteOptions {
  int num_experts, top_k, num_groups, top_k_groups;
  bool normalize, softmax;
  double factor;
};

template <class T>
struct TypedKernels {
  // scores [T, E], bias [E] or null -> experts [T, K], best first, their weights [T, K] and, unless null, scores [T, K].
  void (*choose)(const T* scores, const T* bias, int64_t* experts, T* weights, T* chosen_scores,
                 const RouteOptions& options, int64_t begin, int64_t end);
  // Gradients of weights [T, K] and of scores [T, E], either may be null -> gradient of the logits [T, E].
  void (*route_backward)(const T* grad_weights, const T* grad_scores, const T* scores, const int64_t* experts,
                         T* grad_logits, const RouteOptions& options, int64_t begin, int64_t end);
  // The same from the scores of the chosen experts [T, K], where the weights depend on no others.
  void (*chosen_backward)(const T* grad_weights, const T* chosen_scores, const int64_t* experts, T* grad_logits,
                          const RouteOptions& options, int64_t begin, int64_t end);
  // out[t] = sum over k of weights[t][k] * rows[row_of_choice[t][k]], in the order of k; a negative row is left out, and
  // without weights they are 1.
  void (*sum_rows)(const T* rows, const int64_t* row_of_choice, const T* weights, T* out, int top_k, int64_t width,
                   int64_t begin, int64_t end);
  // The gradients of those rows and weights from grad [T, H]; the row that no choice owns is not written.
  void (*sum_rows_backward)(const T* grad, const T* rows, const int64_t* row_of_choice, const T* weights, T* grad_rows,
                            T* grad_weights, int top_k, int64_t width, int64_t begin, int64_t end);
  // out = silu(gate) * up * weight[row]; weight may be null. Rows of gate and up are `stride` apart.
  void (*swiglu)(const T* gate, const T* up, int64_t stride, const T* weight, T* out, int64_t width, int64_t begin,
                 int64_t end);
  // grad_gate and grad_up have gate's stride; weight and grad_weight may be null, both or none.
  void (*swiglu_backward)(const T* grad, const T* gate, const T* up, int64_t stride, const T* weight, T* grad_gate,
                          T* grad_up, T* grad_weight, int64_t width, int64_t begin, int64_t end);
  // out = input * scale * weight; scale [R] = 1 / sqrt(mean(input^2) + eps). Rows of input are `stride` apart.
  void (*rms_norm)(const T* input, int64_t stride, const T* weight, double eps, T* out, T* scale, int64_t width,
                   int64_t begin, int64_t end);
  // `begin` and `end` count blocks of kRowsOfPartial rows; block b adds up its part of the weight's gradient in
  // partial[b].
  void (*rms_norm_backward)(const T* grad, const T* input, int64_t stride, const T* weight, const T* scale,
                            T* grad_input, T* partial, int64_t num_rows, int64_t width, int64_t begin, int64_t end);
  // Turns the pairs of each row by an angle: (a, b) -> (a cos - b sin, b cos + a sin). cos and sin [length, half]; row r
  // stands at position r / heads % length. Rows of input are `stride` apart, those of out 2 * half. Elements of a pair
  // are `half` apart or, interleaved, neighbours.
  void (*rotate)(const T* input, int64_t stride, const T* cos, const T* sin, T* out, int64_t heads, int64_t length,
                 int64_t half, bool interleaved_input, bool interleaved_out, bool back, int64_t begin, int64_t end);
  // found [C, 4]: of s = logits * scale the greatest, the sums of e^(s - greatest) and of e^(s - greatest) times
  // (s - greatest), and s of the target (0 for a negative one). Logits [C, width].
  void (*policy_statistics)(const T* logits, const int64_t* targets, T scale, T* found, int64_t width, int64_t begin,
                            int64_t end);
  // The gradient of row rows[i] goes to row i of logits itself; rows ascend, so that none is overwritten too soon.
  // `begin` and `end` count blocks of kLogitBlock columns: threads share columns, each goes through all rows.
  void (*policy_gradient)(T* logits, const RowGradients<T>& of, T scale, int64_t num_rows, int64_t width, int64_t begin,
                          int64_t end);
  // `begin` and `end` count panels of kPanelBytes / sizeof(T) columns. Null where vectors are not wide enough for it.
  void (*product)(const Product<T>& product, int64_t begin, int64_t end);
};

struct Kernels {
  const char* level;
  // Copies row t of the input, which begins t * input_step bytes after the first, to its `top_k` rows of the output,
  // which stand side by side; a negative row is left out.
  void (*copy_rows)(const char* input, const int64_t* row_of_choice, char* out, int top_k, int64_t input_step,
                    int64_t row_bytes, bool streaming, int64_t begin, int64_t end);
  TypedKernels<float> f32;
  TypedKernels<double> f64;
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

}  // namespace r1mega
