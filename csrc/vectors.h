// Vectors of 64 bytes and the one product that attention on a CPU is made of. Included by files that are compiled once for
// each instruction set, so everything here has internal linkage. The order of every sum is fixed by these widths and not
// by the instruction set: with fused multiply-adds, sets differ in speed and not in bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// 64 bytes are parts of as many bytes as a register has: GCC keeps a vector that is wider in memory, Clang cuts it up
#if defined(__AVX512F__) || defined(__clang__)
#define CPO_PART 64
#elif defined(__AVX__)
#define CPO_PART 32
#else
#define CPO_PART 16
#endif

#ifdef __AVX512F__
#define CPO_TILE_ROWS 8
#define CPO_TILE_VECTORS 2
#elif defined(__AVX__) || defined(__aarch64__)  // 16 registers of half a vector, or 32 of a quarter
#define CPO_TILE_ROWS 4
#define CPO_TILE_VECTORS 1
#else
#define CPO_TILE_ROWS 2
#define CPO_TILE_VECTORS 1
#endif

#define CPO_INLINE __attribute__((always_inline)) inline

#if defined(__clang__) || __GNUC__ >= 12
#define CPO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t CpoLanes __attribute__((vector_size(CPO_PART)));
#define CPO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, CpoLanes{__VA_ARGS__})
#endif

namespace {

template <typename T, int Bytes>
struct Lanes {
    Lanes<T, Bytes / 2> low, high;
};

template <typename T>
struct Lanes<T, CPO_PART> {
    typedef T Part __attribute__((vector_size(CPO_PART)));
    Part part;
};

template <typename T>
using Values = Lanes<T, 64>;

template <typename T>
struct Vector {
    static constexpr int64_t width = 64 / sizeof(T);
};

template <int Bytes = 64, typename T>
CPO_INLINE Lanes<T, Bytes> load(const T* from) {
    if constexpr (Bytes == CPO_PART) {
        Lanes<T, Bytes> values;
        std::memcpy(&values.part, from, sizeof values.part);
        return values;
    } else {
        return {load<Bytes / 2>(from), load<Bytes / 2>(from + Bytes / 2 / sizeof(T))};
    }
}

template <typename T, int Bytes>
CPO_INLINE void store(T* to, Lanes<T, Bytes> values) {
    if constexpr (Bytes == CPO_PART) {
        std::memcpy(to, &values.part, sizeof values.part);
    } else {
        store(to, values.low);
        store(to + Bytes / 2 / sizeof(T), values.high);
    }
}

template <int Bytes = 64, typename T>
CPO_INLINE Lanes<T, Bytes> broadcast(T value) {
    if constexpr (Bytes == CPO_PART) {
        return {value - typename Lanes<T, Bytes>::Part{}};
    } else {
        return {broadcast<Bytes / 2>(value), broadcast<Bytes / 2>(value)};
    }
}

// `function` of the parts of two.
template <typename T, int Bytes, typename Function>
CPO_INLINE Lanes<T, Bytes> each_part(Lanes<T, Bytes> a, Lanes<T, Bytes> b, Function function) {
    if constexpr (Bytes == CPO_PART) {
        return {function(a.part, b.part)};
    } else {
        return {each_part(a.low, b.low, function), each_part(a.high, b.high, function)};
    }
}

#define CPO_OPERATOR(sign)                                                                                               \
    template <typename T, int Bytes>                                                                                     \
    CPO_INLINE Lanes<T, Bytes> operator sign(Lanes<T, Bytes> a, Lanes<T, Bytes> b) {                                     \
        return each_part(a, b, [](auto x, auto y) __attribute__((always_inline)) { return x sign y; });                 \
    }                                                                                                                    \
    template <typename T, int Bytes>                                                                                     \
    CPO_INLINE Lanes<T, Bytes> operator sign(Lanes<T, Bytes> a, T b) {                                                   \
        return a sign broadcast<Bytes>(b);                                                                               \
    }
CPO_OPERATOR(+)
CPO_OPERATOR(-)
CPO_OPERATOR(*)
CPO_OPERATOR(/)
#undef CPO_OPERATOR

template <typename T, int Bytes>
CPO_INLINE void operator+=(Lanes<T, Bytes>& sum, Lanes<T, Bytes> value) {
    sum = sum + value;
}

// a where it is larger, else b, which also stands for what a NaN is compared with
template <typename T>
CPO_INLINE Values<T> larger(Values<T> a, Values<T> b) {
    return each_part(a, b, [](auto x, auto y) __attribute__((always_inline)) { return x > y ? x : y; });
}

// `values` where `weights` are not 0, else 0
template <typename T>
CPO_INLINE Values<T> weighed(Values<T> weights, Values<T> values) {
    return each_part(weights, values, [](auto x, auto y) __attribute__((always_inline)) {
        return x == 0 ? decltype(y){} : y;
    });
}

CPO_INLINE int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// exp of numbers that are not much above 0; NaN stays, -inf gives 0
template <int Bytes>
CPO_INLINE Lanes<float, Bytes> exponential(Lanes<float, Bytes> of) {
    if constexpr (Bytes != CPO_PART) {
        return {exponential(of.low), exponential(of.high)};
    } else {
        using Part = typename Lanes<float, Bytes>::Part;
        typedef uint32_t Integers __attribute__((vector_size(CPO_PART)));  // unsigned: they may overflow
        constexpr float shifter = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits then hold
        const Part x = of.part, shifted = x * 1.44269504088896341F + shifter;
        const Part exponent = shifted - shifter;
        // ln 2 in two parts, the first exact in few bits; coefficients of Cephes' expf (Moshier)
        const Part rest = x - exponent * 0.693359375F - exponent * -2.12194440e-4F;
        Part series = rest * 1.9875691500e-4F + 1.3981999507e-3F;
        series = series * rest + 8.3334519073e-3F;
        series = series * rest + 4.1665795894e-2F;
        series = series * rest + 1.6666665459e-1F;
        series = series * rest + 5.0000001201e-1F;
        series = series * (rest * rest) + rest + 1.0F;
        const Integers bits = (Integers)series + ((Integers)shifted << 23);
        Part result = (Part)bits;
        result = x < -87.0F ? Part{} : result;  // the smallest would be subnormal
        return {x <= 88.0F ? result : x * std::numeric_limits<float>::infinity()};
    }
}

template <int Bytes>
CPO_INLINE Lanes<double, Bytes> exponential(Lanes<double, Bytes> of) {
    if constexpr (Bytes != CPO_PART) {
        return {exponential(of.low), exponential(of.high)};
    } else {
        for (int lane = 0; lane < Bytes / 8; ++lane) {
            of.part[lane] = std::exp(of.part[lane]);
        }
        return of;
    }
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
    T lanes[Vector<T>::width];
    store(lanes, values);
    T largest = lanes[0];
    for (int64_t lane = 1; lane < Vector<T>::width; ++lane) {
        largest = lanes[lane] > largest ? lanes[lane] : largest;
    }
    return largest;
}

// A square of numbers, rows for columns, from `count` rows `stride` apart, the last of which stands for those that are missing,
// to rows of one vector.
template <typename T>
CPO_INLINE void transpose(const T* from, int64_t stride, int64_t count, T* to) {
    constexpr int64_t width = Vector<T>::width;
    for (int64_t i = 0; i < width; ++i) {
        for (int64_t lane = 0; lane < width; ++lane) {
            to[i * width + lane] = from[(lane < count ? lane : count - 1) * stride + i];
        }
    }
}

#if CPO_PART == 64
// Four times row i and row i + 8, number by number in turn.
template <>
CPO_INLINE void transpose<float>(const float* from, int64_t stride, int64_t count, float* to) {
    using Part = Values<float>::Part;
    Part rows[16], other[16];
    for (int64_t i = 0; i < 16; ++i) {
        rows[i] = load(from + (i < count ? i : count - 1) * stride).part;
    }
    const auto interleave = [](const Part* a, Part* b) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = CPO_SHUFFLE(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            b[2 * i + 1] = CPO_SHUFFLE(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    };
    interleave(rows, other);
    interleave(other, rows);
    interleave(rows, other);
    interleave(other, rows);
    for (int64_t i = 0; i < 16; ++i) {
        store(to + i * 16, Values<float>{rows[i]});
    }
}
#endif

// Panels, [panel, d, lane], of `count` rows `stride` apart.
template <typename T>
CPO_INLINE void panels_of(const T* rows, int64_t stride, int64_t count, int64_t dim, T* panels) {
    constexpr int64_t width = Vector<T>::width;
    for (int64_t position = 0; position < count; position += width) {
        const int64_t some = count - position < width ? count - position : width;
        for (int64_t d = 0; d < dim; d += width) {
            transpose(rows + position * stride + d, stride, some, panels + position * dim + d * width);
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
        const int64_t start = first / width * width;
        panels_of(row(start), dim, rounded_up(last - start, width), dim, panels + start * dim);
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
