// Compiled once for each instruction set, with R1MEGA_LEVEL as its name; the compiler makes the vector code.
//
// All is in an anonymous namespace and nothing of the C++ library is used: the linker merges equal inline functions of
// different object files, and a merged one could hold instructions that the machine does not have.
#include "kernels.h"

#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Where exponential() is limited, what follows from it is a constant: GCC would compute that in a second branch, which
// in vector code is a second division for every number (a SwiGLU of 8 million: 9.7 ms, and 5.1 with this).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-thread-jumps")
#endif

#define R1MEGA_JOIN_(a, b) a##b
#define R1MEGA_JOIN(a, b) R1MEGA_JOIN_(a, b)
#define R1MEGA_TEXT_(a) #a
#define R1MEGA_TEXT(a) R1MEGA_TEXT_(a)

namespace r1mega {
namespace {

template <class T>
struct Number;

template <>
struct Number<float> {
  using Bits = int32_t;
  using Unsigned = uint32_t;
  static constexpr int mantissa = 23, degree = 7;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float lowest = -87.3f, highest = 88.3f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr Bits greatest = INT32_MAX, least = INT32_MIN, one = 0x3f800000, negative_infinity = ~0x7f800000;
};

template <>
struct Number<double> {
  using Bits = int64_t;
  using Unsigned = uint64_t;
  static constexpr int mantissa = 52, degree = 13;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -708.0, highest = 709.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr Bits greatest = INT64_MAX, least = INT64_MIN, one = 0x3ff0000000000000,
                        negative_infinity = ~0x7ff0000000000000;
};

template <class T>
inline typename Number<T>::Bits bits_of(T value) {
  typename Number<T>::Bits bits;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

// e^x by Taylor's series on |r| <= ln(2) / 2, to about one unit in the last place; saturates, hands NaN on.
template <class T>
inline T exponential(T x) {
  using N = Number<T>;
  constexpr double inverse_factorial[] = {1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,
                                          1.0 / 120,  1.0 / 720,   1.0 / 5040,   1.0 / 40320,   1.0 / 362880,
                                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  x = x < N::lowest ? N::lowest : x;
  x = x > N::highest ? N::highest : x;
  const T shifted = x * T(1.44269504088896340736) + N::round;
  const T n = shifted - N::round;
  const T r = (x - n * N::ln2_high) - n * N::ln2_low;
  T power = T(inverse_factorial[N::degree]);
  for (int i = N::degree - 1; i >= 0; --i) power = power * r + T(inverse_factorial[i]);
  using Unsigned = typename N::Unsigned;
  const Unsigned exponent = (Unsigned(bits_of(shifted)) << N::mantissa) + Unsigned(N::one);  // the bits of 2^n
  T scale;
  memcpy(&scale, &exponent, sizeof(T));
  return power * scale;
}

// An integer with the order of the value: NaN is the greatest, as for torch.topk, and -0 equals 0.
template <class T>
inline typename Number<T>::Bits order_of(T value) {
  using N = Number<T>;
  const auto bits = bits_of(value + T(0));
  const auto key = bits ^ ((bits >> (sizeof(T) * 8 - 1)) & N::greatest);
  return value != value ? N::greatest : key;
}

// Leaves only the experts of the best groups; a group's score is the sum of its two best experts' values.
template <class T>
void leave_out_groups(const T* values, typename Number<T>::Bits* keys, const RouteOptions& options) {
  using Bits = typename Number<T>::Bits;
  const int num_groups = options.num_groups, size = options.num_experts / num_groups;
  Bits of_group[kMaxExperts];
  for (int g = 0; g < num_groups; ++g) {
    int best = g * size, second = -1;
    for (int e = g * size + 1; e < (g + 1) * size; ++e) {
      if (keys[e] > keys[best]) {
        second = best;
        best = e;
      } else if (second < 0 || keys[e] > keys[second]) {
        second = e;
      }
    }
    of_group[g] = order_of(second < 0 ? values[best] : values[best] + values[second]);
  }
  for (int g = 0; g < num_groups; ++g) {
    int better = 0;
    for (int other = 0; other < num_groups; ++other)
      better += of_group[other] > of_group[g] || (of_group[other] == of_group[g] && other < g);
    if (better < options.top_k_groups) continue;
    for (int e = g * size; e < (g + 1) * size; ++e) keys[e] = Number<T>::negative_infinity;
  }
}

constexpr int kBlock = 16;  // experts whose greatest key is remembered, so that a choice need not look at all

template <class Bits>
inline Bits greatest_of(const Bits* keys, int count) {
  Bits greatest = keys[0];
#pragma omp simd reduction(max : greatest)
  for (int i = 0; i < count; ++i) greatest = keys[i] > greatest ? keys[i] : greatest;
  return greatest;
}

template <class T>
void choose(const T* scores, const T* bias, int64_t* experts, T* weights, T* chosen_scores, const RouteOptions& options,
            int64_t begin, int64_t end) {
  using Bits = typename Number<T>::Bits;
  const int num_experts = options.num_experts, num_blocks = (num_experts + kBlock - 1) / kBlock;
  T values[kMaxExperts];
  Bits keys[kMaxExperts], best[kMaxExperts / kBlock];
  for (int e = num_experts; e < num_blocks * kBlock; ++e) keys[e] = Number<T>::least;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = scores + t * num_experts;
    if (bias) {
      for (int e = 0; e < num_experts; ++e) values[e] = row[e] + bias[e];
    } else {
      memcpy(values, row, num_experts * sizeof(T));
    }
    for (int e = 0; e < num_experts; ++e) keys[e] = order_of(values[e]);
    if (options.num_groups > 1) leave_out_groups(values, keys, options);
    for (int b = 0; b < num_blocks; ++b) best[b] = greatest_of(keys + b * kBlock, kBlock);
    T sum = 0;
    for (int k = 0; k < options.top_k; ++k) {
      const Bits greatest = greatest_of(best, num_blocks);
      int block = 0;
      while (best[block] != greatest) ++block;
      int expert = block * kBlock;
      while (keys[expert] != greatest) ++expert;
      keys[expert] = Number<T>::least;
      best[block] = greatest_of(keys + block * kBlock, kBlock);
      experts[t * options.top_k + k] = expert;
      weights[t * options.top_k + k] = row[expert];
      sum += row[expert];
    }
    if (chosen_scores) memcpy(chosen_scores + t * options.top_k, weights + t * options.top_k, options.top_k * sizeof(T));
    const T divisor = options.normalize ? sum + T(1e-20) : T(1);
    for (int k = 0; k < options.top_k; ++k) {
      T& weight = weights[t * options.top_k + k];
      weight = weight / divisor * T(options.factor);
    }
  }
}

template <class T>
void route_backward(const T* grad_weights, const T* grad_scores, const T* scores, const int64_t* experts,
                    T* grad_logits, const RouteOptions& options, int64_t begin, int64_t end) {
  const int num_experts = options.num_experts, top_k = options.top_k;
  for (int64_t t = begin; t < end; ++t) {
    const T* score = scores + t * num_experts;
    const int64_t* expert = experts + t * top_k;
    T* grad = grad_logits + t * num_experts;
    if (grad_scores) {
      memcpy(grad, grad_scores + t * num_experts, num_experts * sizeof(T));
    } else {
      memset(grad, 0, num_experts * sizeof(T));
    }
    if (grad_weights) {
      const T* grad_weight = grad_weights + t * top_k;
      T divisor = 1, mean = 0;
      if (options.normalize) {
        divisor = 0;
        for (int k = 0; k < top_k; ++k) divisor += score[expert[k]];
        divisor += T(1e-20);
        for (int k = 0; k < top_k; ++k) mean += grad_weight[k] * score[expert[k]];
        mean /= divisor;
      }
      for (int k = 0; k < top_k; ++k) grad[expert[k]] += (grad_weight[k] - mean) / divisor * T(options.factor);
    }
    if (options.softmax) {
      T dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int e = 0; e < num_experts; ++e) dot += grad[e] * score[e];
      for (int e = 0; e < num_experts; ++e) grad[e] = (grad[e] - dot) * score[e];
    } else {
      for (int e = 0; e < num_experts; ++e) grad[e] *= score[e] * (T(1) - score[e]);
    }
  }
}

// An expert that was not chosen has no gradient: with a sigmoid its score is in no weight; softmax and division by the
// chosen scores' sum are a softmax over the chosen experts.
template <class T>
void chosen_backward(const T* grad_weights, const T* chosen_scores, const int64_t* experts, T* grad_logits,
                     const RouteOptions& options, int64_t begin, int64_t end) {
  const int num_experts = options.num_experts, top_k = options.top_k;
  memset(grad_logits + begin * num_experts, 0, (end - begin) * num_experts * sizeof(T));
  for (int64_t t = begin; t < end; ++t) {
    const T *grad_weight = grad_weights + t * top_k, *score = chosen_scores + t * top_k;
    T divisor = 1, mean = 0, dot = 0;
    if (options.normalize) {
      divisor = T(1e-20);
      for (int k = 0; k < top_k; ++k) divisor += score[k];
      for (int k = 0; k < top_k; ++k) mean += grad_weight[k] * score[k];
      mean /= divisor;
    }
    if (options.softmax)
      for (int k = 0; k < top_k; ++k) dot += (grad_weight[k] - mean) / divisor * T(options.factor) * score[k];
    for (int k = 0; k < top_k; ++k) {
      const T grad_score = (grad_weight[k] - mean) / divisor * T(options.factor);
      grad_logits[t * num_experts + experts[t * top_k + k]] =
          options.softmax ? (grad_score - dot) * score[k] : grad_score * score[k] * (T(1) - score[k]);
    }
  }
}

// Past the cache: the output is not read back for long, and a plain store would first read what it overwrites.
inline void stream_row(char* out, const char* input, int64_t bytes) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(input + i)));
  }
#else
  memcpy(out, input, bytes);
#endif
}

void copy_rows(const char* input, const int64_t* row_of_choice, char* out, int top_k, int64_t input_step,
               int64_t row_bytes, bool streaming, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int k = 0; k < top_k; ++k) {
      const int64_t row = row_of_choice[t * top_k + k];
      if (row < 0) continue;
      if (streaming) {
        stream_row(out + row * row_bytes, input + t * input_step, row_bytes);
      } else {
        memcpy(out + row * row_bytes, input + t * input_step, row_bytes);
      }
    }
  }
#if defined(__SSE2__)
  if (streaming) _mm_sfence();
#endif
}

// out (+)= the sum of up to four rows, each times its weight, added one after the other.
template <class T, int count, bool adds>
void sum_few(const T* const* rows, const T* weights, T* __restrict out, int64_t width) {
#pragma omp simd
  for (int64_t h = 0; h < width; ++h) {
    T sum = adds ? out[h] + weights[0] * rows[0][h] : weights[0] * rows[0][h];
    if (count > 1) sum += weights[1] * rows[1][h];
    if (count > 2) sum += weights[2] * rows[2][h];
    if (count > 3) sum += weights[3] * rows[3][h];
    out[h] = sum;
  }
}

template <class T>
void sum_rows(const T* rows, const int64_t* row_of_choice, const T* weights, T* out, int top_k, int64_t width,
              int64_t begin, int64_t end) {
  using Sum = void (*)(const T* const*, const T*, T*, int64_t);
  constexpr Sum sums[2][5] = {
      {nullptr, sum_few<T, 1, false>, sum_few<T, 2, false>, sum_few<T, 3, false>, sum_few<T, 4, false>},
      {nullptr, sum_few<T, 1, true>, sum_few<T, 2, true>, sum_few<T, 3, true>, sum_few<T, 4, true>}};
  for (int64_t t = begin; t < end; ++t) {
    const T* few[4];
    T weights_of_few[4];
    int count = 0, adds = 0;
    for (int k = 0; k < top_k; ++k) {
      const int64_t choice = t * top_k + k, row = row_of_choice[choice];
      if (row >= 0) {
        weights_of_few[count] = weights ? weights[choice] : T(1);
        few[count++] = rows + row * width;
      }
      if (count == 4) {
        sums[adds][count](few, weights_of_few, out + t * width, width);
        count = 0;
        adds = 1;
      }
    }
    if (count) {
      sums[adds][count](few, weights_of_few, out + t * width, width);
    } else if (!adds) {
      memset(out + t * width, 0, width * sizeof(T));
    }
  }
}

template <class T>
void sum_rows_backward(const T* grad, const T* rows, const int64_t* row_of_choice, const T* weights, T* grad_rows,
                       T* grad_weights, int top_k, int64_t width, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* d = grad + t * width;
    for (int k = 0; k < top_k; ++k) {
      const int64_t choice = t * top_k + k, row = row_of_choice[choice];
      T dot = 0;
      if (row >= 0) {
        const T *r = rows + row * width, w = weights[choice];
        T* __restrict dr = grad_rows + row * width;
#pragma omp simd reduction(+ : dot)
        for (int64_t h = 0; h < width; ++h) {
          dot += d[h] * r[h];
          dr[h] = w * d[h];
        }
      }
      grad_weights[choice] = dot;
    }
  }
}

template <class T>
void swiglu(const T* gate, const T* up, int64_t stride, const T* weight, T* out, int64_t width, int64_t begin,
            int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T *g = gate + r * stride, *u = up + r * stride;
    T* __restrict o = out + r * width;
    const T w = weight ? weight[r] : T(1);
#pragma omp simd
    for (int64_t f = 0; f < width; ++f) o[f] = g[f] / (T(1) + exponential(-g[f])) * u[f] * w;
  }
}

template <class T>
void swiglu_backward(const T* grad, const T* gate, const T* up, int64_t stride, const T* weight, T* grad_gate,
                     T* grad_up, T* grad_weight, int64_t width, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T *d = grad + r * width, *g = gate + r * stride, *u = up + r * stride;
    T *__restrict dg = grad_gate + r * stride, *__restrict du = grad_up + r * stride;
    const T w = weight ? weight[r] : T(1);
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t f = 0; f < width; ++f) {
      const T sigmoid = T(1) / (T(1) + exponential(-g[f]));
      const T silu = g[f] * sigmoid;
      dot += d[f] * silu * u[f];
      du[f] = d[f] * silu * w;
      dg[f] = d[f] * u[f] * w * (sigmoid * (T(1) + g[f] * (T(1) - sigmoid)));
    }
    if (grad_weight) grad_weight[r] = dot;
  }
}

template <class T>
void rms_norm(const T* input, int64_t stride, const T* weight, double eps, T* out, T* scale, int64_t width,
              int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = input + r * stride;
    T* __restrict o = out + r * width;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t h = 0; h < width; ++h) sum += x[h] * x[h];
    const T s = T(1) / T(sizeof(T) == 4 ? __builtin_sqrtf(sum / width + T(eps)) : __builtin_sqrt(sum / width + T(eps)));
    scale[r] = s;
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) o[h] = x[h] * s * weight[h];
  }
}

template <class T>
void rms_norm_backward(const T* grad, const T* input, int64_t stride, const T* weight, const T* scale, T* grad_input,
                       T* partial, int64_t num_rows, int64_t width, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    T* __restrict grad_weight = partial + block * width;
    memset(grad_weight, 0, width * sizeof(T));
    const int64_t last = (block + 1) * kRowsOfPartial < num_rows ? (block + 1) * kRowsOfPartial : num_rows;
    for (int64_t r = block * kRowsOfPartial; r < last; ++r) {
      const T *d = grad + r * width, *x = input + r * stride;
      T* __restrict dx = grad_input + r * width;
      const T s = scale[r];
      T mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t h = 0; h < width; ++h) {
        const T product = d[h] * (x[h] * s);
        grad_weight[h] += product;
        mean += product * weight[h];
      }
      mean /= width;
#pragma omp simd
      for (int64_t h = 0; h < width; ++h) dx[h] = (d[h] * weight[h] - x[h] * s * mean) * s;
    }
  }
}

template <class T>
void rotate(const T* input, int64_t stride, const T* cos, const T* sin, T* out, int64_t heads, int64_t length,
            int64_t half, bool interleaved_input, bool interleaved_out, bool back, int64_t begin, int64_t end) {
  const T sign = back ? T(-1) : T(1);
  const int64_t in_step = interleaved_input ? 2 : 1, in_second = interleaved_input ? 1 : half;
  const int64_t out_step = interleaved_out ? 2 : 1, out_second = interleaved_out ? 1 : half;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t position = r / heads % length;
    const T *x = input + r * stride, *c = cos + position * half, *s = sin + position * half;
    T* __restrict o = out + r * 2 * half;
    if (in_step == 1 && out_step == 1) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        o[i] = x[i] * c[i] - sign * x[half + i] * s[i];
        o[half + i] = x[half + i] * c[i] + sign * x[i] * s[i];
      }
      continue;
    }
    for (int64_t i = 0; i < half; ++i) {
      const T a = x[i * in_step], b = x[i * in_step + in_second];
      o[i * out_step] = a * c[i] - sign * b * s[i];
      o[i * out_step + out_second] = b * c[i] + sign * a * s[i];
    }
  }
}

template <class T>
void policy_statistics(const T* logits, const int64_t* targets, T scale, T* found, int64_t width, int64_t begin,
                       int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = logits + r * width;
    T greatest = 0;
    double sum = 0, moment = 0;
    for (int64_t start = 0; start < width; start += kLogitBlock) {
      const int64_t stop = start + kLogitBlock < width ? start + kLogitBlock : width;
      T top = x[start];
#pragma omp simd reduction(max : top)
      for (int64_t v = start; v < stop; ++v) top = x[v] > top ? x[v] : top;
      top *= scale;
      if (start == 0) {
        greatest = top;
      } else if (top > greatest) {
        const double shift = double(greatest) - double(top), factor = exponential(shift);
        moment = (moment + sum * shift) * factor;
        sum *= factor;
        greatest = top;
      }
      T block_sum = 0, block_moment = 0;
#pragma omp simd reduction(+ : block_sum, block_moment)
      for (int64_t v = start; v < stop; ++v) {
        const T shifted = x[v] * scale - greatest, power = exponential(shifted);
        block_sum += power;
        block_moment += power * shifted;
      }
      sum += block_sum;
      moment += block_moment;
    }
    T* out = found + 4 * r;
    out[0] = greatest;
    out[1] = T(sum);
    out[2] = T(moment);
    out[3] = targets[r] < 0 ? T(0) : x[targets[r]] * scale;
  }
}

template <class T>
void policy_gradient(T* logits, const RowGradients<T>& of, T scale, int64_t num_rows, int64_t width, int64_t begin,
                     int64_t end) {
  const int64_t first = begin * kLogitBlock, last = end * kLogitBlock < width ? end * kLogitBlock : width;
  for (int64_t i = 0; i < num_rows; ++i) {
    const T* x = logits + (of.rows ? of.rows[i] : i) * width;  // this row of the result, or one after it
    T* out = logits + i * width;
    const T lse = of.lse[i], entropy = of.entropy[i], by_log_prob = of.of_log_prob[i] * scale,
            by_entropy = of.of_entropy[i] * scale;
#pragma omp simd
    for (int64_t v = first; v < last; ++v) {
      const T log_p = x[v] * scale - lse;
      out[v] = -exponential(log_p) * (by_log_prob + by_entropy * (log_p + entropy));
    }
    const int64_t target = of.targets[i];
    if (target >= first && target < last) out[target] += by_log_prob;
  }
}

#include "products.h"

#if !defined(R1MEGA_PRODUCTS)
template <class T>
constexpr void (*product)(const Product<T>&, int64_t, int64_t) = nullptr;
#endif

template <class T>
constexpr TypedKernels<T> typed() {
  return {choose<T>, route_backward<T>, chosen_backward<T>, sum_rows<T>, sum_rows_backward<T>, swiglu<T>,
          swiglu_backward<T>, rms_norm<T>, rms_norm_backward<T>, rotate<T>,
          policy_statistics<T>, policy_gradient<T>, product<T>};
}

}  // namespace

extern const Kernels R1MEGA_JOIN(kernels_, R1MEGA_LEVEL) = {R1MEGA_TEXT(R1MEGA_LEVEL), copy_rows, typed<float>(),
                                                            typed<double>()};

}  // namespace r1mega
