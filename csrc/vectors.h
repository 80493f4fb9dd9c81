// Vectors of 64 bytes and the one product that attention on a CPU is made of. Included by files that are compiled once for
// each instruction set, so everything here has internal linkage. The order of every sum is fixed by these widths and not
// by the instruction set: with fused multiply-adds, sets differ in speed and not in bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512F__
#define CPO_TILE_ROWS 8
#define CPO_TILE_VECTORS 2
#else  // 16 registers of half a vector
#define CPO_TILE_ROWS 4
#define CPO_TILE_VECTORS 1
#endif

#define CPO_INLINE __attribute__((always_inline)) inline

#if defined(__clang__) || __GNUC__ >= 12
#define CPO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t CpoLanes __attribute__((vector_size(64)));
#define CPO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, CpoLanes{__VA_ARGS__})
#endif

namespace {

template <typename T>
struct Vector;

template <>
struct Vector<float> {
    typedef float Values __attribute__((vector_size(64)));
    typedef uint32_t Integers __attribute__((vector_size(64)));  // unsigned: they may overflow
    static constexpr int64_t width = 16;
};

template <>
struct Vector<double> {
    typedef double Values __attribute__((vector_size(64)));
    static constexpr int64_t width = 8;
};

template <typename T>
using Values = typename Vector<T>::Values;

template <typename T>
CPO_INLINE Values<T> load(const T* from) {
    Values<T> values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

template <typename T>
CPO_INLINE void store(T* to, Values<T> values) {
    std::memcpy(to, &values, sizeof values);
}

template <typename T>
CPO_INLINE Values<T> broadcast(T value) {
    return value - Values<T>{};
}

CPO_INLINE int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// exp of numbers that are not much above 0; NaN stays, -inf gives 0
CPO_INLINE Values<float> exponential(Values<float> x) {
    using Integers = Vector<float>::Integers;
    constexpr float shifter = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
    const Values<float> shifted = x * 1.44269504088896341F + shifter;
    const Values<float> exponent = shifted - shifter;
    // ln 2 in two parts, the first exact in few bits; coefficients of Cephes' expf (Moshier)
    const Values<float> rest = x - exponent * 0.693359375F - exponent * -2.12194440e-4F;
    Values<float> series = rest * 1.9875691500e-4F + 1.3981999507e-3F;
    series = series * rest + 8.3334519073e-3F;
    series = series * rest + 4.1665795894e-2F;
    series = series * rest + 1.6666665459e-1F;
    series = series * rest + 5.0000001201e-1F;
    series = series * (rest * rest) + rest + 1.0F;
    const Integers bits = (Integers)series + ((Integers)shifted << 23);
    Values<float> result = (Values<float>)bits;
    result = x < -87.0F ? Values<float>{} : result;  // the smallest would be subnormal
    return x <= 88.0F ? result : x * std::numeric_limits<float>::infinity();
}

CPO_INLINE Values<double> exponential(Values<double> x) {
    for (int64_t lane = 0; lane < Vector<double>::width; ++lane) {
        x[lane] = std::exp(x[lane]);
    }
    return x;
}

template <typename T>
CPO_INLINE T sum_of(Values<T> values) {
    T lanes[Vector<T>::width];
    store(lanes, values);
    for (int64_t half = Vector<T>::width / 2; half > 0; half /= 2) {
        for (int64_t lane = 0; lane < half; ++lane) {
            lanes[lane] += lanes[lane + half];
        }
    }
    return lanes[0];
}

template <typename T>
CPO_INLINE T largest_of(Values<T> values) {
    T largest = values[0];
    for (int64_t lane = 1; lane < Vector<T>::width; ++lane) {
        largest = values[lane] > largest ? values[lane] : largest;
    }
    return largest;
}

// A square of vectors, rows for columns: four times row i and row i + 8, number by number in turn.
CPO_INLINE void transpose(Values<float>* rows) {
    Values<float> other[16];
    const auto interleave = [](const Values<float>* from, Values<float>* to) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            to[2 * i] = CPO_SHUFFLE(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            to[2 * i + 1] = CPO_SHUFFLE(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    };
    interleave(rows, other);
    interleave(other, rows);
    interleave(rows, other);
    interleave(other, rows);
}

CPO_INLINE void transpose(Values<double>* rows) {
    for (int64_t i = 0; i < Vector<double>::width; ++i) {
        for (int64_t j = 0; j < i; ++j) {
            const double kept = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = kept;
        }
    }
}

// Rows [position, d], d padded to whole vectors, and the same numbers as panels of one vector's positions, [panel, d, lane].
template <typename T>
struct Path {
    T *rows, *panels;
    int64_t dim;  // padded

    T* row(int64_t position) const { return rows + position * dim; }

    // Panels of positions [first, last), whole ones: what they held of others before `first` is written again.
    void make_panels(int64_t first, int64_t last) const {
        constexpr int64_t width = Vector<T>::width;
        for (int64_t position = first / width * width; position < last; position += width) {
            for (int64_t d = 0; d < dim; d += width) {
                Values<T> square[width];
                for (int64_t i = 0; i < width; ++i) {
                    square[i] = load(row(position + i) + d);
                }
                transpose(square);
                for (int64_t i = 0; i < width; ++i) {
                    store(panels + position * dim + (d + i) * width, square[i]);
                }
            }
        }
    }
};

// d padded with zeros, times a factor
template <typename T>
CPO_INLINE void copy_padded(T* to, const T* from, int64_t head_dim, int64_t dim, T factor) {
    for (int64_t d = 0; d < head_dim; ++d) {
        to[d] = from[d] * factor;
    }
    for (int64_t d = head_dim; d < dim; ++d) {
        to[d] = 0;
    }
}

// One product: c[m][n] (+)= sum over k of a(m, k) * b(k, n), summed over k in order. n is counted in vectors.
template <typename T>
struct Product {
    const T* a;
    int64_t a_row, a_step;  // between rows, between terms
    const T* b;
    int64_t b_step, b_vector;  // between terms, between vectors
    T* c;
    int64_t c_row;
    int64_t num_rows, num_vectors, num_terms;
    bool adds;
};

template <int Rows, int Vectors, typename T>
CPO_INLINE void tile(const Product<T>& p, int64_t row, int64_t vector) {
    constexpr int64_t width = Vector<T>::width;
    const T* a = p.a + row * p.a_row;
    const T* b = p.b + vector * p.b_vector;
    T* c = p.c + row * p.c_row + vector * width;
    Values<T> sums[Rows][Vectors] = {};
    for (int64_t k = 0; k < p.num_terms; ++k) {
        Values<T> right[Vectors];
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) {
            right[n] = load(b + k * p.b_step + n * p.b_vector);
        }
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
            const Values<T> left = broadcast(a[m * p.a_row + k * p.a_step]);
#pragma GCC unroll 2
            for (int n = 0; n < Vectors; ++n) {
                sums[m][n] += left * right[n];
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < Vectors; ++n) {
            T* at = c + m * p.c_row + n * width;
            store(at, p.adds ? load(at) + sums[m][n] : sums[m][n]);
        }
    }
}

template <int Vectors, typename T>
CPO_INLINE void columns(const Product<T>& p, int64_t vector) {
    int64_t row = 0;
    for (; row + CPO_TILE_ROWS <= p.num_rows; row += CPO_TILE_ROWS) {
        tile<CPO_TILE_ROWS, Vectors>(p, row, vector);
    }
#if CPO_TILE_ROWS > 4
    if (row + 4 <= p.num_rows) {
        tile<4, Vectors>(p, row, vector);
        row += 4;
    }
#endif
    if (row + 2 <= p.num_rows) {
        tile<2, Vectors>(p, row, vector);
        row += 2;
    }
    if (row < p.num_rows) {
        tile<1, Vectors>(p, row, vector);
    }
}

template <typename T>
void multiply(const Product<T>& p) {
    int64_t vector = 0;
    for (; vector + CPO_TILE_VECTORS <= p.num_vectors; vector += CPO_TILE_VECTORS) {
        columns<CPO_TILE_VECTORS>(p, vector);
    }
#if CPO_TILE_VECTORS > 1
    if (vector < p.num_vectors) {
        columns<1>(p, vector);
    }
#endif
}

}  // namespace
