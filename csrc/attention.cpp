// Causal attention in the manner of FlashAttention-2 (2307.08691): scores exist for one block of queries and keys at a time, and the
// backward pass computes the probabilities again from the kept log-sum-exp.
//
// One work item is one key/value head of one sequence with all the query heads that share it, so that no two threads add to the same
// gradient. Keys, values and queries of that head are first copied into cache-friendly layouts with their width padded by zeros to whole
// registers: T*D copies against T*T*D arithmetic.
#include <cmath>

#include "kernels.h"
#include "matmul.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {
namespace {

// Block sizes: whole tiles, and scores that stay in the nearest caches.
constexpr int64_t kQueries = 96;
constexpr int64_t kKeys = 192;
static_assert(kQueries % kTileRows == 0 && kKeys % kTileRows == 0 && kKeys % kPanel == 0);

// Copies rows, with zeros after `width` up to `padded`.
void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t width, float* to, int64_t padded) {
    for (int64_t r = 0; r < rows; ++r, from += stride, to += padded)
        for (int64_t c = 0; c < padded; c += kLanes) store(to + c, load_first(from + c, width - c));
}

// [rows, width] -> panels of kPanel rows, each transposed to [width, kPanel]; rows that do not exist are 0.
void copy_transposed(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
    for (int64_t first = 0; first < rows; first += kPanel, to += kPanel * width) {
        int64_t count = smaller(kPanel, rows - first), whole_rows = count / 4 * 4, whole_columns = width / 4 * 4;
        const float* panel = from + first * stride;
        if (count < kPanel) memset(to, 0, kPanel * width * sizeof(float));
        for (int64_t c = 0; c < whole_columns; c += 4)
            for (int64_t r = 0; r < whole_rows; r += 4) transpose_4x4(panel + r * stride + c, stride, to + c * kPanel + r, kPanel);
        for (int64_t r = 0; r < count; ++r)
            for (int64_t c = r < whole_rows ? whole_columns : 0; c < width; ++c) to[c * kPanel + r] = panel[r * stride + c];
    }
}

// The reverse of copy_rows. Rows of one head lie far apart, so that without the prefetch every one waits for its cache lines.
constexpr int64_t kRowsAhead = 16;
void write_rows(const float* from, int64_t padded, int64_t rows, int64_t width, float* to, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r, from += padded, to += stride) {
        for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(to + kRowsAhead * stride + c, 1);
        for (int64_t c = 0; c < width; c += kLanes) store_first(to + c, load(from + c), width - c);
    }
}

// visit(row, column, acc) gets the scores of queries [q0, q0 + rows) and keys [k0, k0 + columns) in registers of kLanes columns.
// Registers that the causal mask hides entirely are not computed.
template <class Visit>
void scores(int64_t q0, int64_t rows, int64_t k0, int64_t columns, const float* a, int64_t a_stride, const float* panels, int64_t width,
            Visit visit) {
    for (int64_t c = 0; c < columns; c += kPanel) {
        const float* panel = panels + (k0 + c) * width;
        for (int64_t r = 0; r < rows; r += kTileRows) {
            int64_t seen = q0 + r + kTileRows - (k0 + c);  // columns up to the own key of the tile's last row
            int64_t vectors = smaller(blocks_of(kLanes, seen), kTileVectors);
            auto done = [&](int64_t row, int64_t vector, Vec acc) { visit(r + row, c + vector * kLanes, acc); };
            if (seen > 0) tile_up_to<kTileRows, kTileVectors>(vectors, rows - r, width, a + r * a_stride, a_stride, 1, panel, kPanel, done);
        }
    }
}

struct Layout {
    int64_t qk_padded, v_padded, panel_rows;
    explicit Layout(const AttentionShape& s)
        : qk_padded(round_up(s.qk_width, kLanes)), v_padded(round_up(s.v_width, kLanes)), panel_rows(round_up(s.time, kPanel)) {}
};

// One block of queries [q0, q0 + rows) against all keys before them.
void attend(const AttentionShape& s, const Layout& layout, int64_t q0, int64_t rows, const float* q, int64_t q_stride,
            const float* k_panels, const float* v, float* block, float* sums, float* y, int64_t y_stride, float* log_sum) {
    float top[kQueries];
    Vec total[kQueries] = {};
    for (int64_t r = 0; r < rows; ++r) top[r] = -INFINITY;
    for (int64_t k0 = 0; k0 < q0 + rows; k0 += kKeys) {
        int64_t columns = smaller(kKeys, q0 + rows - k0);
        scores(q0, rows, k0, columns, q, q_stride, k_panels, s.qk_width,
               [&](int64_t r, int64_t c, Vec acc) { store(block + r * kKeys + c, acc * s.scale); });
        for (int64_t r = 0; r < rows; ++r) {
            float* row = block + r * kKeys;
            int64_t seen = smaller(columns, q0 + r + 1 - k0);
            if (seen <= 0) {
                memset(row, 0, smaller(columns, kTileRows) * sizeof(float));
                continue;
            }
            int64_t end = round_up(seen, kLanes);
            for (int64_t c = seen; c < end; ++c) row[c] = -INFINITY;
            Vec tops = load(row);
            for (int64_t c = kLanes; c < end; c += kLanes) tops = max(tops, load(row + c));
            float new_top = max(tops);
            new_top = new_top > top[r] ? new_top : top[r];
            if (k0 > 0) {
                float shrink = exp(splat(top[r] - new_top))[0];
                total[r] *= shrink;
                for (int64_t c = 0; c < layout.v_padded; c += kLanes)
                    store(sums + r * layout.v_padded + c, load(sums + r * layout.v_padded + c) * shrink);
            }
            for (int64_t c = 0; c < end; c += kLanes) {
                Vec e = exp(load(row + c) - new_top);
                store(row + c, e);
                total[r] += e;
            }
            for (int64_t c = end; c < smaller(columns, seen + kTileRows); c += kLanes) store(row + c, Vec{});  // read by its tile
            top[r] = new_top;
        }
        bool first = k0 == 0;
        multiply(rows, layout.v_padded, block, kKeys, 1, v + k0 * layout.v_padded, layout.v_padded,
                 [&](int64_t r) { return Range{0, smaller(columns, q0 + r + kTileRows - k0)}; },
                 [&](int64_t r, int64_t c, Vec acc) {
                     float* to = sums + r * layout.v_padded + c;
                     store(to, first ? acc : load(to) + acc);
                 });
    }
    for (int64_t r = 0; r < rows; ++r) {
        float all = sum(total[r]), scale = 1 / all;
        for (int64_t c = 0; c < s.v_width; c += kLanes)
            store_first(y + r * y_stride + c, load(sums + r * layout.v_padded + c) * scale, smaller(kLanes, s.v_width - c));
        log_sum[r] = top[r] + logf(all);
    }
}

}  // namespace

void attention(AttentionShape s, Heads q, Heads k, Heads v, Heads y, float* log_sum, int threads) {
    const Layout layout(s);
    const int64_t group = s.heads / s.kv_heads;
    const int64_t blocks = blocks_of(kQueries, s.time);
    // With few heads, several items share one and take every so many-th block of queries; each copies the keys for itself.
    const int64_t shares = smaller(blocks, blocks_of(s.batch * s.kv_heads, threads));
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(s.qk_width * layout.panel_rows + s.time * layout.v_padded + kQueries * (kKeys + layout.v_padded) + 64);
        float* k_panels = scratch.take(s.qk_width * layout.panel_rows);
        float* v_rows = scratch.take(s.time * layout.v_padded);
        float* block = scratch.take(kQueries * kKeys);
        float* sums = scratch.take(kQueries * layout.v_padded);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < s.batch * s.kv_heads * shares; ++item) {
            int64_t b = item / (s.kv_heads * shares), kv = item / shares % s.kv_heads, share = item % shares;
            copy_transposed(k.at(b, 0, kv), k.time_stride, s.time, s.qk_width, k_panels);
            copy_rows(v.at(b, 0, kv), v.time_stride, s.time, s.v_width, v_rows, layout.v_padded);
            for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
                for (int64_t q0 = share * kQueries; q0 < s.time; q0 += shares * kQueries)
                    attend(s, layout, q0, smaller(kQueries, s.time - q0), q.at(b, q0, h), q.time_stride, k_panels, v_rows, block, sums,
                           y.at(b, q0, h), y.time_stride, log_sum + (b * s.heads + h) * s.time + q0);
        }
    }
}

void attention_backward(AttentionShape s, Heads q, Heads k, Heads v, Heads y, const float* log_sum, Heads grad, Heads grad_q, Heads grad_k,
                        Heads grad_v, int threads) {
    const Layout layout(s);
    const int64_t group = s.heads / s.kv_heads, wide = layout.qk_padded, narrow = layout.v_padded;
    const IntVec lanes = lane_numbers();
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch((s.qk_width + s.v_width) * layout.panel_rows + s.time * (3 * wide + 2 * narrow) + kQueries * (2 * kKeys + wide) +
                        s.time + 9 * 16);
        float* k_panels = scratch.take(s.qk_width * layout.panel_rows);
        float* v_panels = scratch.take(s.v_width * layout.panel_rows);
        float* k_rows = scratch.take(s.time * wide);
        float* q_rows = scratch.take(s.time * wide);
        float* grad_rows = scratch.take(s.time * narrow);
        float* k_sums = scratch.take(s.time * wide);
        float* v_sums = scratch.take(s.time * narrow);
        float* probabilities = scratch.take(kQueries * kKeys);
        float* slopes = scratch.take(kQueries * kKeys);  // d loss / d score, scaled
        float* q_sums = scratch.take(kQueries * wide);
        float* delta = scratch.take(s.time);  // row sums of probability times its gradient
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < s.batch * s.kv_heads; ++item) {
            int64_t b = item / s.kv_heads, kv = item % s.kv_heads;
            copy_rows(k.at(b, 0, kv), k.time_stride, s.time, s.qk_width, k_rows, wide);
            copy_transposed(k_rows, wide, s.time, s.qk_width, k_panels);
            copy_rows(v.at(b, 0, kv), v.time_stride, s.time, s.v_width, v_sums, narrow);
            copy_transposed(v_sums, narrow, s.time, s.v_width, v_panels);
            memset(k_sums, 0, s.time * wide * sizeof(float));
            memset(v_sums, 0, s.time * narrow * sizeof(float));
            for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
                copy_rows(q.at(b, 0, h), q.time_stride, s.time, s.qk_width, q_rows, wide);
                copy_rows(grad.at(b, 0, h), grad.time_stride, s.time, s.v_width, grad_rows, narrow);
                const float* log_sums = log_sum + (b * s.heads + h) * s.time;
                for (int64_t t = 0; t < s.time; ++t) {
                    Vec products = {};
                    for (int64_t c = 0; c < s.v_width; c += kLanes)
                        products += load(grad_rows + t * narrow + c) * load_first(y.at(b, t, h) + c, smaller(kLanes, s.v_width - c));
                    delta[t] = sum(products);
                }
                for (int64_t q0 = 0; q0 < s.time; q0 += kQueries) {
                    const int64_t rows = smaller(kQueries, s.time - q0);
                    for (int64_t k0 = 0; k0 < q0 + rows; k0 += kKeys) {
                        const int64_t columns = smaller(kKeys, q0 + rows - k0);
                        scores(q0, rows, k0, columns, q_rows + q0 * wide, wide, k_panels, s.qk_width, [&](int64_t r, int64_t c, Vec acc) {
                            Vec p = exp(acc * s.scale - log_sums[q0 + r]);
                            store(probabilities + r * kKeys + c, lanes + int32_t(k0 + c) <= int32_t(q0 + r) ? p : Vec{});
                        });
                        auto slope = [&](int64_t r, int64_t c, Vec acc) {
                            Vec p = load(probabilities + r * kKeys + c);
                            store(slopes + r * kKeys + c, p * (acc - delta[q0 + r]) * s.scale);
                        };
                        scores(q0, rows, k0, columns, grad_rows + q0 * narrow, narrow, v_panels, s.v_width, slope);
                        auto queries_of = [&](int64_t c) { return Range{larger(0, k0 + c - q0), rows}; };
                        multiply(columns, narrow, probabilities, 1, kKeys, grad_rows + q0 * narrow, narrow, queries_of,
                                 add_to(v_sums + k0 * narrow, narrow));
                        multiply(columns, wide, slopes, 1, kKeys, q_rows + q0 * wide, wide, queries_of, add_to(k_sums + k0 * wide, wide));
                        auto keys_of = [&](int64_t r) { return Range{0, smaller(columns, q0 + r + kTileRows - k0)}; };
                        bool first = k0 == 0;
                        multiply(rows, wide, slopes, kKeys, 1, k_rows + k0 * wide, wide, keys_of, [&](int64_t r, int64_t c, Vec acc) {
                            float* to = q_sums + r * wide + c;
                            store(to, first ? acc : load(to) + acc);
                        });
                    }
                    write_rows(q_sums, wide, rows, s.qk_width, grad_q.at(b, q0, h), grad_q.time_stride);
                }
            }
            write_rows(k_sums, wide, s.time, s.qk_width, grad_k.at(b, 0, kv), grad_k.time_stride);
            write_rows(v_sums, narrow, s.time, s.v_width, grad_v.at(b, 0, kv), grad_v.time_stride);
        }
    }
}

}  // namespace shoal::SHOAL_ISA
