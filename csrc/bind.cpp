// r1mega._C: the kernels as Python functions of integers, tensor.data_ptr() among them. Nothing here knows torch, so
// the extension compiles in seconds and serves every version of it; the checks of shapes and types are in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "buffers.h"
#include "kernels.h"

namespace r1mega {
namespace {

constexpr int kInterface = 9;                  // r1mega/kernels/native.py wants the same; raise both together
constexpr int64_t kElementsOfThread = 1 << 16;  // less work is not worth a thread

const Kernels* best_kernels() {
#if defined(R1MEGA_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return &kernels_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2;
#endif
  return &kernels_baseline;
}

const Kernels* kernels = best_kernels();

void set_level(const std::string& level) {
  std::vector<const Kernels*> known = {&kernels_baseline};
#if defined(R1MEGA_X86)
  known.insert(known.end(), {&kernels_avx2, &kernels_avx512});
#endif
  for (const Kernels* candidate : known) {
    // The levels grow: one that is compiled in and not above the machine's best runs here.
    if (level == candidate->level) {
      kernels = candidate;
      return;
    }
    if (candidate == best_kernels()) break;
  }
  throw std::invalid_argument("this machine cannot run " + level);
}

// work(begin, end) on equal parts of 0 to count, each on a thread of its own.
template <class Work>
void share(int64_t count, int64_t elements_each, int threads, const Work& work) {
  const int64_t useful = count * elements_each / kElementsOfThread;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, useful, count}));
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part)
    others.emplace_back(work, count * part / parts, count * (part + 1) / parts);
  work(0, count / parts);
  for (std::thread& other : others) other.join();
}

// The same for tokens whose choices own rows below `num_rows`, or none (a negative row): any other is an error.
template <class Work>
void share_tokens(int64_t num_tokens, int64_t elements_each, int threads, const int64_t* row_of_choice, int top_k,
                  int64_t num_rows, const Work& work) {
  std::atomic<bool> outside{false};
  share(num_tokens, elements_each, threads, [&](int64_t begin, int64_t end) {
    int64_t greatest = -1;
    for (int64_t i = begin * top_k; i < end * top_k; ++i) greatest = std::max(greatest, row_of_choice[i]);
    if (greatest < num_rows)
      work(begin, end);
    else
      outside = true;
  });
  if (outside)
    throw std::invalid_argument("row_of_choice: leads outside of the " + std::to_string(num_rows) +
                                " rows that there are");
}

template <class T>
const TypedKernels<T>& typed();
template <>
const TypedKernels<float>& typed() { return kernels->f32; }
template <>
const TypedKernels<double>& typed() { return kernels->f64; }

using Pointer = uintptr_t;

template <class T>
T* at(Pointer pointer) { return reinterpret_cast<T*>(pointer); }

// The rank of a choice is the number of choices of its expert before it. `num_experts` marks a dropped choice. Others may
// have made the choices: a wrong one, which would be counted outside of `seen`, is seen at no cost here.
void rank_choices(Pointer experts, Pointer ranks, Pointer counts, int64_t num_choices, int64_t num_experts) {
  std::vector<int64_t> seen(num_experts + 1, 0);
  for (int64_t i = 0; i < num_choices; ++i) {
    const int64_t expert = at<int64_t>(experts)[i];
    if (uint64_t(expert) > uint64_t(num_experts))
      throw std::invalid_argument("experts_TK: expert " + std::to_string(expert) + " (choice " + std::to_string(i) +
                                  "); they go from 0 to " + std::to_string(num_experts - 1) + ", and " +
                                  std::to_string(num_experts) + " marks a dropped choice");
    at<int64_t>(ranks)[i] = seen[expert]++;
  }
  std::copy(seen.begin(), seen.end() - 1, at<int64_t>(counts));
}

template <class T>
void route(Pointer scores, Pointer bias, Pointer experts, Pointer weights, Pointer chosen_scores, Pointer ranks,
           Pointer counts, int64_t num_tokens, int num_experts, int top_k, int num_groups, int top_k_groups, bool normalize,
           double factor, int threads) {
  const RouteOptions options{num_experts, top_k, num_groups, top_k_groups, normalize, false, factor};
  share(num_tokens, num_experts, threads, [&](int64_t begin, int64_t end) {
    typed<T>().choose(at<T>(scores), at<T>(bias), at<int64_t>(experts), at<T>(weights), at<T>(chosen_scores), options,
                      begin, end);
  });
  rank_choices(experts, ranks, counts, num_tokens * top_k, num_experts);
}

template <class T>
void route_backward(Pointer grad_weights, Pointer grad_scores, Pointer scores, Pointer experts, Pointer grad_logits,
                    int64_t num_tokens, int num_experts, int top_k, bool normalize, bool softmax, double factor,
                    int threads) {
  const RouteOptions options{num_experts, top_k, 1, 1, normalize, softmax, factor};
  share(num_tokens, num_experts, threads, [&](int64_t begin, int64_t end) {
    typed<T>().route_backward(at<T>(grad_weights), at<T>(grad_scores), at<T>(scores), at<int64_t>(experts),
                              at<T>(grad_logits), options, begin, end);
  });
}

template <class T>
void chosen_backward(Pointer grad_weights, Pointer chosen_scores, Pointer experts, Pointer grad_logits,
                     int64_t num_tokens, int num_experts, int top_k, bool normalize, bool softmax, double factor,
                     int threads) {
  const RouteOptions options{num_experts, top_k, 1, 1, normalize, softmax, factor};
  share(num_tokens, num_experts, threads, [&](int64_t begin, int64_t end) {
    typed<T>().chosen_backward(at<T>(grad_weights), at<T>(chosen_scores), at<int64_t>(experts), at<T>(grad_logits),
                               options, begin, end);
  });
}

// Copies rows into expert order: choice i of expert e goes to row first_of_expert[e] + rank[i]; the map is written too.
// A row outside of the result, of choices that do not fit their counts, is not written: it is an error. So is a dropped
// choice, of expert `num_experts`, unless they may be dropped.
void permute(Pointer input, Pointer experts, Pointer ranks, Pointer first_of_expert, Pointer row_of_choice,
             Pointer out, int64_t num_tokens, int64_t num_experts, int top_k, bool may_drop, int64_t num_rows,
             int64_t input_step, int64_t row_bytes, bool streaming, int threads) {
  std::atomic<bool> outside{false};
  share(num_tokens, top_k * row_bytes / 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * top_k; i < end * top_k; ++i) {
      const int64_t expert = at<int64_t>(experts)[i];
      int64_t row = -1;
      if (expert != num_experts || !may_drop) {
        if (uint64_t(expert) < uint64_t(num_experts)) row = at<int64_t>(first_of_expert)[expert] + at<int64_t>(ranks)[i];
        if (uint64_t(row) >= uint64_t(num_rows)) {
          outside = true;
          row = -1;
        }
      }
      at<int64_t>(row_of_choice)[i] = row;
    }
    kernels->copy_rows(at<char>(input), at<int64_t>(row_of_choice), at<char>(out), top_k, input_step, row_bytes,
                       streaming, begin, end);
  });
  if (outside)
    throw std::invalid_argument("experts_TK and ranks_TK lead to rows outside of the " + std::to_string(num_rows) +
                                " that there are: they must fit counts_E, and may_drop be True where choices are dropped");
}

void copy_rows(Pointer input, Pointer row_of_choice, Pointer out, int64_t num_tokens, int top_k, int64_t num_rows,
               int64_t input_step, int64_t row_bytes, bool streaming, int threads) {
  const int64_t* rows = at<int64_t>(row_of_choice);
  share_tokens(num_tokens, top_k * row_bytes / 4, threads, rows, top_k, num_rows, [&](int64_t begin, int64_t end) {
    kernels->copy_rows(at<char>(input), rows, at<char>(out), top_k, input_step, row_bytes, streaming, begin, end);
  });
}

template <class T>
void sum_rows(Pointer rows, Pointer row_of_choice, Pointer weights, Pointer out, int64_t num_tokens, int top_k,
              int64_t num_rows, int64_t width, int threads) {
  const int64_t* owned = at<int64_t>(row_of_choice);
  share_tokens(num_tokens, top_k * width, threads, owned, top_k, num_rows, [&](int64_t begin, int64_t end) {
    typed<T>().sum_rows(at<T>(rows), owned, at<T>(weights), at<T>(out), top_k, width, begin, end);
  });
}

template <class T>
void sum_rows_backward(Pointer grad, Pointer rows, Pointer row_of_choice, Pointer weights, Pointer grad_rows,
                       Pointer grad_weights, int64_t num_tokens, int top_k, int64_t num_rows, int64_t width,
                       int threads) {
  const int64_t* owned = at<int64_t>(row_of_choice);
  share_tokens(num_tokens, 2 * top_k * width, threads, owned, top_k, num_rows, [&](int64_t begin, int64_t end) {
    typed<T>().sum_rows_backward(at<T>(grad), at<T>(rows), owned, at<T>(weights), at<T>(grad_rows),
                                 at<T>(grad_weights), top_k, width, begin, end);
  });
}

template <class T>
void swiglu(Pointer gate, Pointer up, int64_t stride, Pointer weight, Pointer out, int64_t num_rows, int64_t width,
            int threads) {
  share(num_rows, 4 * width, threads, [&](int64_t begin, int64_t end) {
    typed<T>().swiglu(at<T>(gate), at<T>(up), stride, at<T>(weight), at<T>(out), width, begin, end);
  });
}

template <class T>
void swiglu_backward(Pointer grad, Pointer gate, Pointer up, int64_t stride, Pointer weight, Pointer grad_gate,
                     Pointer grad_up, Pointer grad_weight, int64_t num_rows, int64_t width, int threads) {
  share(num_rows, 4 * width, threads, [&](int64_t begin, int64_t end) {
    typed<T>().swiglu_backward(at<T>(grad), at<T>(gate), at<T>(up), stride, at<T>(weight), at<T>(grad_gate),
                               at<T>(grad_up), at<T>(grad_weight), width, begin, end);
  });
}

template <class T>
void rms_norm(Pointer input, int64_t stride, Pointer weight, double eps, Pointer out, Pointer scale, int64_t num_rows,
              int64_t width, int threads) {
  share(num_rows, width, threads, [&](int64_t begin, int64_t end) {
    typed<T>().rms_norm(at<T>(input), stride, at<T>(weight), eps, at<T>(out), at<T>(scale), width, begin, end);
  });
}

template <class T>
void rms_norm_backward(Pointer grad, Pointer input, int64_t stride, Pointer weight, Pointer scale, Pointer grad_input,
                       Pointer partial, int64_t num_rows, int64_t width, int threads) {
  const int64_t blocks = (num_rows + kRowsOfPartial - 1) / kRowsOfPartial;
  share(blocks, kRowsOfPartial * width, threads, [&](int64_t begin, int64_t end) {
    typed<T>().rms_norm_backward(at<T>(grad), at<T>(input), stride, at<T>(weight), at<T>(scale), at<T>(grad_input),
                                 at<T>(partial), num_rows, width, begin, end);
  });
}

template <class T>
void rotate(Pointer input, int64_t stride, Pointer cos, Pointer sin, Pointer out, int64_t num_rows, int64_t heads,
            int64_t length, int64_t half, bool interleaved_input, bool interleaved_out, bool back, int threads) {
  share(num_rows, 2 * half, threads, [&](int64_t begin, int64_t end) {
    typed<T>().rotate(at<T>(input), stride, at<T>(cos), at<T>(sin), at<T>(out), heads, length, half, interleaved_input,
                      interleaved_out, back, begin, end);
  });
}

template <class T>
void policy_statistics(Pointer logits, Pointer targets, double scale, Pointer found, int64_t num_rows, int64_t width,
                       int threads) {
  share(num_rows, 4 * width, threads, [&](int64_t begin, int64_t end) {
    typed<T>().policy_statistics(at<T>(logits), at<int64_t>(targets), T(scale), at<T>(found), width, begin, end);
  });
}

template <class T>
void policy_gradient(Pointer logits, Pointer rows, Pointer targets, Pointer lse, Pointer entropy, Pointer of_log_prob,
                     Pointer of_entropy, double scale, int64_t num_rows, int64_t width, int threads) {
  const RowGradients<T> of{at<int64_t>(rows), at<int64_t>(targets), at<T>(lse), at<T>(entropy), at<T>(of_log_prob),
                           at<T>(of_entropy)};
  share((width + kLogitBlock - 1) / kLogitBlock, 4 * kLogitBlock * num_rows, threads, [&](int64_t begin, int64_t end) {
    typed<T>().policy_gradient(at<T>(logits), of, T(scale), num_rows, width, begin, end);
  });
}

// One product of each group. With rows < 0 a group has its count of rows, in A and in C, and a matrix B of its own,
// `b_group` after the one before; with depth < 0 its count is its depth, in A and in B, and C is its own.
template <class T>
void products(Pointer a, int64_t a_row, int64_t a_depth, Pointer b, int64_t b_group, int64_t b_depth, int64_t b_col,
              Pointer c, int64_t c_group, int64_t c_row, const std::vector<int64_t>& counts, int64_t rows, int64_t cols,
              int64_t depth, bool add, int threads) {
  if (!typed<T>().product) throw std::runtime_error(std::string(kernels->level) + " code has no products");
  std::vector<Product<T>> groups;
  int64_t before = 0, largest = 0;
  for (size_t g = 0; g < counts.size(); ++g) {
    const int64_t in_a = before * (rows < 0 ? a_row : a_depth), in_b = rows < 0 ? g * b_group : before * b_depth,
                  in_c = rows < 0 ? before * c_row : g * c_group;
    groups.push_back({at<T>(a) + in_a, a_row, a_depth, at<T>(b) + in_b, b_depth, b_col, at<T>(c) + in_c, c_row,
                      rows < 0 ? counts[g] : rows, cols, depth < 0 ? counts[g] : depth, add});
    before += counts[g];
    largest = std::max(largest, groups.back().rows * groups.back().depth);
  }
  const int64_t panel = kPanelBytes / sizeof(T), panels = (cols + panel - 1) / panel;
  share(counts.size() * panels, largest * panel / 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin / panels; g * panels < end; ++g)
      typed<T>().product(groups[g], std::max<int64_t>(begin - g * panels, 0), std::min(end - g * panels, panels));
  });
}

template <class T>
void define_typed(pybind11::module_& m, const std::string& suffix) {
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  m.def(("route_" + suffix).c_str(), &route<T>, without_gil);
  m.def(("route_backward_" + suffix).c_str(), &route_backward<T>, without_gil);
  m.def(("chosen_backward_" + suffix).c_str(), &chosen_backward<T>, without_gil);
  m.def(("sum_rows_" + suffix).c_str(), &sum_rows<T>, without_gil);
  m.def(("sum_rows_backward_" + suffix).c_str(), &sum_rows_backward<T>, without_gil);
  m.def(("swiglu_" + suffix).c_str(), &swiglu<T>, without_gil);
  m.def(("swiglu_backward_" + suffix).c_str(), &swiglu_backward<T>, without_gil);
  m.def(("rms_norm_" + suffix).c_str(), &rms_norm<T>, without_gil);
  m.def(("rms_norm_backward_" + suffix).c_str(), &rms_norm_backward<T>, without_gil);
  m.def(("rotate_" + suffix).c_str(), &rotate<T>, without_gil);
  m.def(("policy_statistics_" + suffix).c_str(), &policy_statistics<T>, without_gil);
  m.def(("policy_gradient_" + suffix).c_str(), &policy_gradient<T>, without_gil);
  m.def(("products_" + suffix).c_str(), &products<T>, without_gil);
}

}  // namespace
}  // namespace r1mega

PYBIND11_MODULE(_C, m) {
  using namespace r1mega;
  const pybind11::call_guard<pybind11::gil_scoped_release> without_gil;
  m.attr("INTERFACE") = kInterface;
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.attr("ROWS_OF_PARTIAL") = kRowsOfPartial;
  m.def("level", [] { return kernels->level; });
  m.def("set_level", &set_level);
  pybind11::class_<Buffer>(m, "Buffer", pybind11::buffer_protocol())
      .def(pybind11::init<size_t>())
      .def_buffer([](Buffer& buffer) {
        return pybind11::buffer_info(buffer.data(), 1, pybind11::format_descriptor<uint8_t>::format(),
                                     pybind11::ssize_t(buffer.bytes()));
      });
  // Whether products of level() are faster than those of PyTorch's library, which has wide vectors for Intel's alone.
  m.def("multiplies", [] {
#if defined(R1MEGA_X86)
    return kernels->f32.product != nullptr && !__builtin_cpu_is("intel");
#else
    return false;
#endif
  });
  m.def("waiting_bytes", &waiting_bytes);
  m.def("release_waiting", &release_waiting);
  m.def("rank_choices", &rank_choices, without_gil);
  m.def("permute", &permute, without_gil);
  m.def("copy_rows", &copy_rows, without_gil);
  define_typed<float>(m, "float32");
  define_typed<double>(m, "float64");
}
