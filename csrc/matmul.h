// Small matrix products whose accumulators stay in registers.
#pragma once
#include "vector.h"

namespace shoal::SHOAL_ISA {

// A tile takes rows * vectors accumulators, `vectors` registers of B and one of A: of 32 registers with AVX-512, of 16 otherwise.
constexpr int kTileRows = kLanes == 16 ? 8 : 6;
constexpr int kTileVectors = kLanes == 16 ? 3 : 2;
constexpr int64_t kPanel = kTileVectors * kLanes;  // rows of a transposed operand that are packed together

struct Range {
    int64_t begin, end;
};

// done(row, vector, acc) for rows [0, rows) of A [M, depth] times B [depth, V registers]; A's elements are a_row and a_column apart.
// Rows beyond `rows` are computed from the last one and dropped.
template <int M, int V, class Done>
SHOAL_INLINE void tile(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                       Done done) {
    const float* from[M] = {a};
#pragma GCC unroll 16
    for (int i = 1; i < M; ++i) from[i] = from[i - 1] + (i < rows ? a_row : 0);
    Vec acc[M][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vec columns[V];
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) columns[j] = load(b + k * b_row + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            float x = from[i][k * a_column];
#pragma GCC unroll 16
            for (int j = 0; j < V; ++j) acc[i][j] += x * columns[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        if (i >= rows) break;
#pragma GCC unroll 16
        for (int j = 0; j < V; ++j) done(i, j, acc[i][j]);
    }
}

// The same with 1 to V registers of B.
template <int M, int V, class Done>
SHOAL_INLINE void tile_up_to(int64_t vectors, int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                             int64_t b_row, Done done) {
    if constexpr (V > 1)
        if (vectors < V) return tile_up_to<M, V - 1>(vectors, rows, depth, a, a_row, a_column, b, b_row, done);
    tile<M, V>(rows, depth, a, a_row, a_column, b, b_row, done);
}

// A function of its own: inlined, GCC 12 may keep accumulators in memory.
template <int V, class Depth, class Done>
__attribute__((noinline)) void multiply_columns(int64_t rows, int64_t column, const float* a, int64_t a_row, int64_t a_column,
                                                const float* b, int64_t b_row, Depth depth, Done done) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
        Range range = depth(r);
        if (range.begin >= range.end) continue;
        tile<kTileRows, V>(rows - r, range.end - range.begin, a + r * a_row + range.begin * a_column, a_row, a_column,
                   b + range.begin * b_row + column, b_row, [&](int i, int j, Vec acc) { done(r + i, column + j * kLanes, acc); });
    }
}

// done(row, column, acc) over A [rows, K] times B [K, width]. depth(row) is the part of K that the tile starting at `row` needs.
template <class Depth, class Done>
void multiply(int64_t rows, int64_t width, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, Depth depth,
              Done done) {
    int64_t vectors = width / kLanes, parts = blocks_of(kTileVectors, vectors);
    for (int64_t part = 0, column = 0; part < parts; ++part) {
        int64_t taken = (vectors - column / kLanes) / (parts - part);  // parts as equal as they can be
        if (taken == 1) multiply_columns<1>(rows, column, a, a_row, a_column, b, b_row, depth, done);
        if (taken == 2) multiply_columns<2>(rows, column, a, a_row, a_column, b, b_row, depth, done);
        if constexpr (kTileVectors >= 3)
            if (taken == 3) multiply_columns<3>(rows, column, a, a_row, a_column, b, b_row, depth, done);
        column += taken * kLanes;
    }
}

SHOAL_INLINE auto write_to(float* to, int64_t stride) {
    return [=](int64_t row, int64_t column, Vec acc) { store(to + row * stride + column, acc); };
}
SHOAL_INLINE auto add_to(float* to, int64_t stride) {
    return [=](int64_t row, int64_t column, Vec acc) {
        float* p = to + row * stride + column;
        store(p, load(p) + acc);
    };
}

}  // namespace shoal::SHOAL_ISA
