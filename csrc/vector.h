// One SIMD register of floats, through the vector extensions of GCC and Clang: the same source serves every instruction set.
//
// Everything here is `static`, and no template of the standard library is used in the kernels: the linker would merge equal functions
// of different instruction sets, and a plain machine could be left with the AVX-512 one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#define SHOAL_LANES 16
#elif defined(__AVX2__)
#define SHOAL_LANES 8
#else
#define SHOAL_LANES 4
#endif
#define SHOAL_INLINE static inline __attribute__((always_inline))

namespace shoal::SHOAL_ISA {

constexpr int64_t kLanes = SHOAL_LANES;
typedef float Vec __attribute__((vector_size(4 * SHOAL_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * SHOAL_LANES)));

SHOAL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SHOAL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SHOAL_INLINE int64_t blocks_of(int64_t size, int64_t n) { return (n + size - 1) / size; }
SHOAL_INLINE int64_t round_up(int64_t n, int64_t size) { return blocks_of(size, n) * size; }

SHOAL_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
SHOAL_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
// The first n <= kLanes floats; the rest is 0, or left alone.
SHOAL_INLINE Vec load_first(const float* p, int64_t n) {
    if (n >= kLanes) return load(p);
    Vec v = {};
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
}
SHOAL_INLINE void store_first(float* p, Vec v, int64_t n) {
    if (n >= kLanes) return store(p, v);
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

SHOAL_INLINE Vec splat(float x) { return Vec{} + x; }
SHOAL_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

SHOAL_INLINE IntVec lane_numbers() {
    IntVec v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

// to[j, i] = from[i, j].
SHOAL_INLINE void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    typedef float Four __attribute__((vector_size(16)));
    Four a, b, c, d;
    memcpy(&a, from, 16);
    memcpy(&b, from + from_stride, 16);
    memcpy(&c, from + 2 * from_stride, 16);
    memcpy(&d, from + 3 * from_stride, 16);
#if defined(__clang__)
#define SHOAL_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
    typedef int32_t FourInts __attribute__((vector_size(16)));
#define SHOAL_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, FourInts{__VA_ARGS__})
#endif
    Four ab_low = SHOAL_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHOAL_SHUFFLE(a, b, 2, 6, 3, 7);
    Four cd_low = SHOAL_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHOAL_SHUFFLE(c, d, 2, 6, 3, 7);
    a = SHOAL_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
    b = SHOAL_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    c = SHOAL_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
    d = SHOAL_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
#undef SHOAL_SHUFFLE
    memcpy(to, &a, 16);
    memcpy(to + to_stride, &b, 16);
    memcpy(to + 2 * to_stride, &c, 16);
    memcpy(to + 3 * to_stride, &d, 16);
}

// to[c, r] = from[r, c].
SHOAL_INLINE void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                            int64_t to_stride) {
    const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
    for (int64_t c = 0; c < whole_columns; c += 4)
        for (int64_t r = 0; r < whole_rows; r += 4)
            transpose_4x4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
}

// Pairwise, in a fixed order.
SHOAL_INLINE float sum(Vec v) {
    float part[kLanes];
    store(part, v);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}
SHOAL_INLINE float max(Vec v) {
    float part[kLanes];
    store(part, v);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) part[i] = part[i] > part[i + half] ? part[i] : part[i + half];
    return part[0];
}

// e^x to about 2 ulp between -87 and 88; 0 below, 1.7e38 above, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, then a Taylor polynomial in r, times 2^n.
SHOAL_INLINE Vec exp(Vec x) {
    x = x < -88.0f ? splat(-88.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
    Vec shifted = x * 1.44269504f + round;
    Vec n = shifted - round;
    Vec r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
    r = r + n * 2.12194440e-4f;
    Vec p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    IntVec exponent = ((IntVec)shifted + (127 - 0x4B400000)) << 23;  // n = -127 gives a power of 0
    return p * (Vec)exponent;
}

// Threads worth starting for an operation on so many floats.
SHOAL_INLINE int team(int64_t floats, int threads) { return floats < 32768 ? 1 : threads; }

// Working memory of one thread, aligned to cache lines and freed at the end of the scope.
class Scratch {
  public:
    explicit Scratch(int64_t floats) : data_(static_cast<float*>(aligned_alloc(64, round_up(floats * 4 + 64, 64)))) {
        if (!data_) abort();
    }
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    // The next `floats` of it.
    float* take(int64_t floats) {
        float* start = data_ + used_;
        used_ += round_up(floats, 16);
        return start;
    }

  private:
    float* data_;
    int64_t used_ = 0;
};

}  // namespace shoal::SHOAL_ISA
