// Matrix products in vectors of 64 bytes. PyTorch's library (MKL) gives such vectors to Intel's processors alone, and on
// all others multiplies at half their speed or less.
//
// A panel of columns of B is copied so that a row of it is kVectors vectors; then kRows rows of C at a time stay in
// registers while the depth goes by (Goto and van de Geijn, 2008). A is read where it lies: each of its numbers meets a
// whole row of the panel. A number of C is one sum in the order of the depth, cut only into pieces of kDepth, so its
// bits do not depend on how many rows there are, nor on threads. Included by kernels.cpp alone.
#pragma once

#if defined(__AVX512F__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define R1MEGA_PRODUCTS
#endif
#endif

#if defined(R1MEGA_PRODUCTS)

constexpr int kVectors = 4, kRows = 6;  // 24 sums, 4 vectors of the panel and one number of A: 29 of 32 registers

template <class T>
struct Wide {
  static constexpr int lanes = 64 / sizeof(T);
  static constexpr int64_t depth = 2048 / sizeof(T);  // a panel of so many rows is 128 KiB
  typedef T Vector __attribute__((vector_size(64)));
  typedef T Unaligned __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
};
static_assert(kVectors * 64 == kPanelBytes, "bind.cpp shares panels");

inline Wide<float>::Vector first_halves(Wide<float>::Vector a, Wide<float>::Vector b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Wide<float>::Vector last_halves(Wide<float>::Vector a, Wide<float>::Vector b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Wide<double>::Vector first_halves(Wide<double>::Vector a, Wide<double>::Vector b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Wide<double>::Vector last_halves(Wide<double>::Vector a, Wide<double>::Vector b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// out[k][n] = in[n][k] for a square of one vector's size; rows are `stride` and `out_stride` apart.
template <class T>
inline void transpose_square(const T* in, int64_t stride, T* out, int64_t out_stride) {
  constexpr int lanes = Wide<T>::lanes;
  typename Wide<T>::Vector x[lanes], y[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) x[i] = *reinterpret_cast<const typename Wide<T>::Unaligned*>(in + i * stride);
  // each round joins rows that are half the square apart; after log2(lanes) of them rows are columns
#pragma GCC unroll 4
  for (int size = 1; size < lanes; size *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      y[2 * i] = first_halves(x[i], x[i + lanes / 2]);
      y[2 * i + 1] = last_halves(x[i], x[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) *reinterpret_cast<typename Wide<T>::Unaligned*>(out + i * out_stride) = x[i];
}

// panel[k][0 to width] = B[first + k][column + ...]; columns from `cols` on are zeros.
template <class T>
void fill_panel(const Product<T>& p, int64_t first, int64_t depth, int64_t column, int64_t cols, int64_t width,
                T* panel) {
  constexpr int lanes = Wide<T>::lanes;
  const T* b = p.b + first * p.b_depth + column * p.b_col;
  if (p.b_col == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      memcpy(panel + k * width, b + k * p.b_depth, cols * sizeof(T));
      for (int64_t n = cols; n < width; ++n) panel[k * width + n] = T(0);
    }
    return;
  }
  // here the depth is what lies side by side
  const int64_t whole_cols = cols / lanes * lanes, whole_depth = depth / lanes * lanes;
  for (int64_t k = 0; k < whole_depth; k += lanes)
    for (int64_t n = 0; n < whole_cols; n += lanes)
      transpose_square<T>(b + n * p.b_col + k, p.b_col, panel + k * width + n, width);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = k < whole_depth ? whole_cols : 0; n < width; ++n)
      panel[k * width + n] = n < cols ? b[n * p.b_col + k] : T(0);
}

// `rows` rows and `vectors` vectors of C; of the last vector only `last` numbers are C's.
template <class T, int rows, int vectors>
void multiply_panel(const T* a, int64_t a_row, int64_t a_depth, const T* panel, int64_t depth, T* c, int64_t c_row,
                    int last, bool add) {
  using Vector = typename Wide<T>::Vector;
  using Unaligned = typename Wide<T>::Unaligned;
  constexpr int lanes = Wide<T>::lanes;
  Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sums[i][j] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector b[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) b[j] = *reinterpret_cast<const Vector*>(panel + (k * vectors + j) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector number = a[i * a_row + k * a_depth] - Vector{};  // in all lanes
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] += number * b[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      T* out = c + i * c_row + j * lanes;
      if (j < vectors - 1 || last == lanes) {
        auto& whole = *reinterpret_cast<Unaligned*>(out);
        whole = add ? whole + sums[i][j] : sums[i][j];
        continue;
      }
      T part[lanes];
      memcpy(part, &sums[i][j], sizeof(part));
      for (int n = 0; n < last; ++n) out[n] = add ? out[n] + part[n] : part[n];
    }
}

template <class T, int vectors>
void multiply_rows(int64_t rows, const T* a, int64_t a_row, int64_t a_depth, const T* panel, int64_t depth, T* c,
                   int64_t c_row, int last, bool add) {
  using Multiply = void (*)(const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t, int, bool);
  static constexpr Multiply of_rows[kRows] = {multiply_panel<T, 1, vectors>, multiply_panel<T, 2, vectors>,
                                              multiply_panel<T, 3, vectors>, multiply_panel<T, 4, vectors>,
                                              multiply_panel<T, 5, vectors>, multiply_panel<T, 6, vectors>};
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t here = rows - i < kRows ? rows - i : kRows;
    of_rows[here - 1](a + i * a_row, a_row, a_depth, panel, depth, c + i * c_row, c_row, last, add);
  }
}

template <class T>
void product(const Product<T>& p, int64_t begin, int64_t end) {
  constexpr int lanes = Wide<T>::lanes;
  alignas(64) T panel[Wide<T>::depth * kVectors * lanes];
  for (int64_t column = begin * kVectors * lanes; column < p.cols && column < end * kVectors * lanes;
       column += kVectors * lanes) {
    const int64_t left = p.cols - column, cols = left < kVectors * lanes ? left : kVectors * lanes;
    const int64_t vectors = (cols + lanes - 1) / lanes, last = cols - (vectors - 1) * lanes;
    // a depth of 0 is a sum of nothing: zeros
    for (int64_t first = 0; first == 0 || first < p.depth; first += Wide<T>::depth) {
      const int64_t depth = p.depth - first < Wide<T>::depth ? p.depth - first : Wide<T>::depth;
      fill_panel(p, first, depth, column, cols, vectors * lanes, panel);
      const T* a = p.a + first * p.a_depth;
      T* c = p.c + column;
      const bool add = p.add || first > 0;
      switch (vectors) {
        case 1: multiply_rows<T, 1>(p.rows, a, p.a_row, p.a_depth, panel, depth, c, p.c_row, last, add); break;
        case 2: multiply_rows<T, 2>(p.rows, a, p.a_row, p.a_depth, panel, depth, c, p.c_row, last, add); break;
        case 3: multiply_rows<T, 3>(p.rows, a, p.a_row, p.a_depth, panel, depth, c, p.c_row, last, add); break;
        default: multiply_rows<T, 4>(p.rows, a, p.a_row, p.a_depth, panel, depth, c, p.c_row, last, add);
      }
    }
  }
}

#endif  // R1MEGA_PRODUCTS
