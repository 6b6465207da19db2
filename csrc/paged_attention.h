// Attention of new tokens over the paged cache: MLA in its absorbed form (all heads share the latent) and GQA.
//
// The positions of a sequence are cut into blocks of kBlock. A block is summed up on its own and blocks are merged from the first to the
// last, so that a token's result depends neither on its neighbours nor on how the work was divided.
#pragma once
#include "linear.h"

namespace shoal::SHOAL_ISA {

constexpr int64_t kRows = 16;                      // queries that share one pass over a block
constexpr int64_t kAbreast = kLanes == 16 ? 4 : 2;  // queries in one register tile

// Some queries of one sequence that look at the same key head.
struct Queries {
    int64_t token, tokens, kv_head, head, heads;  // rows: token-major
    const int32_t* table;
    int64_t blocks, first_partial;

    SHOAL_INLINE_MEMBER int64_t rows() const { return tokens * heads; }
};

// Where keys and values lie in a cached row.
struct Slices {
    int64_t key, key_width, value, value_width;
};

// Sums over one block, or over all blocks up to one: of row r, values [r] are not yet divided by weight[r].
struct Partial {
    float *top, *weight;  // [kRows]
    float* values;        // [kRows, value_width]
};

SHOAL_INLINE int64_t partial_size(int64_t value_width) { return 2 * kRows + kRows * value_width; }
SHOAL_INLINE Partial partial_at(float* p, int64_t value_width, int64_t i) {
    p += i * partial_size(value_width);
    return {p, p + kRows, p + 2 * kRows};
}

// sums[4 m + n] = the sum of register a[m][n].
#if defined(__AVX512F__)
template <class Register>
SHOAL_INLINE void sum_tile(const Register (&a)[4][4], float* sums) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
        const __m512 x = (__m512)a[m][0], y = (__m512)a[m][1], z = (__m512)a[m][2], w = (__m512)a[m][3];
        const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
        const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
        // In each quarter: partial sums of the four.
        rows[m] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    }
    __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(rows[0], rows[1], 0x88), _mm512_shuffle_f32x4(rows[0], rows[1], 0xDD));
    __m512 second = _mm512_add_ps(_mm512_shuffle_f32x4(rows[2], rows[3], 0x88), _mm512_shuffle_f32x4(rows[2], rows[3], 0xDD));
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xDD)));
}
#else
SHOAL_INLINE void sum_tile(const Vec (&a)[kAbreast][4], float* sums) {
    typedef float Four __attribute__((vector_size(16)));
#pragma GCC unroll 4
    for (int m = 0; m < kAbreast; ++m) {
        float square[16];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            alignas(64) float parts[kLanes];
            store(parts, a[m][n]);
            Four sum = {};
            for (int64_t j = 0; j < kLanes; j += 4) {
                Four quarter;
                memcpy(&quarter, parts + j, 16);
                sum += quarter;
            }
            memcpy(square + 4 * n, &sum, 16);
        }
        transpose_4x4(square, 4, square, 4);
        Four total = {};
        for (int i = 0; i < 4; ++i) {
            Four row;
            memcpy(&row, square + 4 * i, 16);
            total += row;
        }
        memcpy(sums + 4 * m, &total, 16);
    }
}
#endif

// Key or value rows of a block: row i of page p.
struct BlockRows {
    const uint8_t* pages[kBlock / kPage];
    int64_t stride;  // bytes of a cached row

    SHOAL_INLINE_MEMBER const uint8_t* operator[](int64_t i) const { return pages[i / kPage] + (i % kPage) * stride; }
};

// What a block is computed in that is not stored so: read once, it serves the scores of all queries and the mix of their values.
#if defined(__AVX512BF16__)
typedef uint16_t Wide;
constexpr Format kWide = Format::bf16;  // holds every e4m3 number exactly
SHOAL_INLINE void store_wide(Wide* to, Vec x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
typedef float Wide;
constexpr Format kWide = Format::fp32;
SHOAL_INLINE void store_wide(Wide* to, Vec x) { store(to, x); }
#endif
SHOAL_INLINE int64_t wide_row(int64_t width) { return round_up(width, 32); }  // a row starts at a cache line

template <Format kFormat>
static BlockRows widened(const BlockRows& from, int64_t count, int64_t width, Wide* to) {
    constexpr int64_t size = kFormat == Format::bf16 ? 2 : 1;
    auto read = [](const uint8_t* p) {
        if constexpr (kFormat == Format::bf16) return from_bf16(reinterpret_cast<const uint16_t*>(p));
        if constexpr (kFormat == Format::fp8) return from_fp8(p);
    };
    const int64_t row = wide_row(width), whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < count; ++i) {
        const uint8_t* x = from[i];
        for (int64_t c = 0; c < whole; c += kLanes) store_wide(to + i * row + c, read(x + c * size));
        if (whole == width) continue;
        alignas(64) uint8_t last[kLanes * size] = {};  // nothing behind the row may be read
        memcpy(last, x + whole * size, (width - whole) * size);
        store_wide(to + i * row + whole, read(last));
    }
    BlockRows rows = {{}, row * static_cast<int64_t>(sizeof(Wide))};
    for (int64_t page = 0; page * kPage < count; ++page) rows.pages[page] = reinterpret_cast<const uint8_t*>(to + page * kPage * row);
    return rows;
}

// Working memory of one thread.
struct Room {
    uint16_t* pairs;  // [kBlock, value width in stripes]
    Wide* wide;       // [kBlock, wide_row(key width)] and, where values are no part of their keys, the same of values
};

#if defined(__AVX512BF16__)
// bf16 caches: pairs of products in one instruction, queries and probabilities rounded to bf16.
constexpr int64_t kPairLanes = 32;

SHOAL_INLINE __m512bh load_bf16(const void* p, int64_t n) {
    if (n >= kPairLanes) return (__m512bh)_mm512_loadu_si512(p);
    return (__m512bh)_mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, p);
}

// One by one: GCC would fill the whole array through memory.
SHOAL_INLINE void clear(__m512 (&a)[4][4]) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) a[m][n] = _mm512_setzero_ps();
}

static void scores_bf16(const Queries& item, const float* const* query, const BlockRows& keys, int64_t count, int64_t width, float* scores) {
    const int64_t padded = round_up(width, kPairLanes), rows = item.rows();
    alignas(64) uint16_t q[kRows * padded];
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < padded; c += kPairLanes) {
            Vec low = load_first(query[r] + c, width - c);
            Vec high = c + kLanes < width ? load_first(query[r] + c + kLanes, width - c - kLanes) : Vec{};
            __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            memcpy(q + r * padded + c, &both, sizeof both);
        }
    for (int64_t i = 0; i < count; i += 4)
        for (int64_t r = 0; r < rows; r += 4) {
            const uint16_t* from[4];
            for (int64_t j = 0; j < 4; ++j) from[j] = q + smaller(r + j, rows - 1) * padded;
            __m512 acc[4][4];
            clear(acc);
            const uint8_t* key[4] = {keys[i], keys[i] + keys.stride, keys[i] + 2 * keys.stride, keys[i] + 3 * keys.stride};
            for (int64_t c = 0; c < width; c += kPairLanes) {
                __m512bh k[4];
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n) {
                    k[n] = load_bf16(key[n] + 2 * c, width - c);
                    if (r == 0) __builtin_prefetch(key[n] + 2 * c + 4 * keys.stride);  // the next four keys
                }
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    __m512bh x = (__m512bh)_mm512_load_si512(from[m] + c);
#pragma GCC unroll 4
                    for (int n = 0; n < 4; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], x, k[n]);
                }
            }
            float sums[16];
            sum_tile(acc, sums);
            for (int64_t m = 0; m < 4 && r + m < rows; ++m) memcpy(scores + (r + m) * kBlock + i, sums + 4 * m, 16);
        }
}

static void mix_bf16(int64_t rows, const float* probabilities, const BlockRows& values, int64_t count, int64_t width, float* out,
                     uint16_t* pairs) {
    // Stripes of 64 columns, each without gaps: [stripe, couple, 64, 2].
    const int64_t couples = blocks_of(2, count), stripe = 4 * kLanes;
    auto place = [=](int64_t couple, int64_t c) { return pairs + ((c / stripe * couples + couple) * stripe + c % stripe) * 2; };
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34,
                                           2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < couples; ++i)
        for (int64_t c = 0; c < width; c += kPairLanes) {
            __m512i a = (__m512i)load_bf16(values[2 * i] + 2 * c, width - c), b = {};
            if (2 * i + 1 < count) b = (__m512i)load_bf16(values[2 * i + 1] + 2 * c, width - c);
            _mm512_store_si512(place(i, c), _mm512_permutex2var_epi16(a, first, b));
            _mm512_store_si512(place(i, c) + kPairLanes, _mm512_permutex2var_epi16(a, second, b));
        }
    alignas(64) uint16_t p[kRows * kBlock];
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < 2 * couples; i += kPairLanes) {
            const float* from = probabilities + r * kBlock + i;
            __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(from + kLanes), (__m512)load(from));
            memcpy(p + r * kBlock + i, &both, sizeof both);
        }
    for (int64_t c = 0; c < width; c += stripe)
        for (int64_t r = 0; r < rows; r += 4) {
            const uint16_t *weight[4], *from = place(0, c);
            for (int64_t j = 0; j < 4; ++j) weight[j] = p + smaller(r + j, rows - 1) * kBlock;
            __m512 acc[4][4];
            clear(acc);
            for (int64_t i = 0; i < couples; ++i) {
                __m512bh v[4];
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n) v[n] = (__m512bh)_mm512_load_si512(from + (i * stripe + n * kLanes) * 2);
#pragma GCC unroll 4
                for (int m = 0; m < 4; ++m) {
                    int32_t couple;
                    memcpy(&couple, weight[m] + 2 * i, 4);
                    __m512bh x = (__m512bh)_mm512_set1_epi32(couple);
#pragma GCC unroll 4
                    for (int n = 0; n < 4; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], x, v[n]);
                }
            }
            for (int64_t m = 0; m < 4 && r + m < rows; ++m)
                for (int64_t n = 0; n < 4; ++n)
                    if (c + n * kLanes < width)
                        store_first(out + (r + m) * width + c + n * kLanes, (Vec)acc[m][n], width - c - n * kLanes);
        }
}
#endif

static void scores_fp32(const Queries& item, const float* const* query, const BlockRows& keys, int64_t count, int64_t width, float* scores) {
    const int64_t rows = item.rows(), whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < count; i += 4)
        for (int64_t r = 0; r < rows; r += kAbreast) {
            const float* from[kAbreast];
            for (int64_t j = 0; j < kAbreast; ++j) from[j] = query[smaller(r + j, rows - 1)];
            Vec acc[kAbreast][4] = {};
            const float* key[4];
            for (int64_t n = 0; n < 4; ++n) key[n] = reinterpret_cast<const float*>(keys[i] + n * keys.stride);
            for (int64_t c = 0; c < width; c += kLanes) {
                Vec k[4];
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n) k[n] = c < whole ? load(key[n] + c) : load_first(key[n] + c, width - c);
#pragma GCC unroll 4
                for (int m = 0; m < kAbreast; ++m) {
                    Vec x = c < whole ? load(from[m] + c) : load_first(from[m] + c, width - c);
#pragma GCC unroll 4
                    for (int n = 0; n < 4; ++n) acc[m][n] += x * k[n];
                }
            }
            float sums[4 * kAbreast];
            sum_tile(acc, sums);
            for (int64_t m = 0; m < kAbreast && r + m < rows; ++m) memcpy(scores + (r + m) * kBlock + i, sums + 4 * m, 16);
        }
}

// Columns [c, c + N registers) of a mix; the last register may be cut off by `width`.
template <int N, bool kWhole>
SHOAL_INLINE void mix_columns(int64_t rows, const float* probabilities, const BlockRows& values, int64_t count, int64_t width, int64_t c,
                              float* out) {
    for (int64_t r = 0; r < rows; r += kAbreast) {
        const float* weight[kAbreast];
        for (int64_t j = 0; j < kAbreast; ++j) weight[j] = probabilities + smaller(r + j, rows - 1) * kBlock;
        Vec acc[kAbreast][N] = {};
        for (int64_t i = 0; i < count; ++i) {
            const float* row = reinterpret_cast<const float*>(values[i]) + c;
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                const Vec v = kWhole ? load(row + n * kLanes) : load_first(row, width - c);
#pragma GCC unroll 4
                for (int m = 0; m < kAbreast; ++m) acc[m][n] += v * weight[m][i];
            }
        }
        // Unrolled too: an index known only at run time would keep the sums in memory.
#pragma GCC unroll 4
        for (int m = 0; m < kAbreast; ++m)
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n)
                if (r + m < rows) store_first(out + (r + m) * width + c + n * kLanes, acc[m][n], kWhole ? kLanes : width - c);
    }
}

static void mix_fp32(int64_t rows, const float* probabilities, const BlockRows& values, int64_t count, int64_t width, float* out) {
    int64_t c = 0;
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) mix_columns<2, true>(rows, probabilities, values, count, width, c, out);
    for (; c + kLanes <= width; c += kLanes) mix_columns<1, true>(rows, probabilities, values, count, width, c, out);
    if (c < width) mix_columns<1, false>(rows, probabilities, values, count, width, c, out);
}

// Sums of one block. query: a pointer for each row; positions: of the item's tokens.
SHOAL_INLINE void attend_block(const Queries& item, const float* const* query, const int64_t* positions, const Cache& cache,
                               const uint8_t* layer, Slices slices, float scale, int64_t block, Partial out, Room room) {
    const int64_t size = cache.format == Format::fp32 ? 4 : cache.format == Format::bf16 ? 2 : 1;
    const int64_t start = block * kBlock, rows = item.rows();
    const int64_t count = smaller(kBlock, positions[item.tokens - 1] + 1 - start);
    BlockRows keys = {{}, cache.width * size}, values = keys;
    for (int64_t page = 0; page * kPage < count; ++page) {
        const int64_t number = item.table[start / kPage + page];
        keys.pages[page] = layer + (number * kPage * cache.width + slices.key) * size;
        values.pages[page] = layer + (number * kPage * cache.width + slices.value) * size;
    }
    if (cache.format != Format::fp32 && cache.format != kWide) {
        auto widen = [&](const BlockRows& from, int64_t width, Wide* to) {
            return cache.format == Format::bf16 ? widened<Format::bf16>(from, count, width, to) : widened<Format::fp8>(from, count, width, to);
        };
        const bool part = slices.value == slices.key;
        keys = widen(keys, slices.key_width, room.wide);
        values = part ? keys : widen(values, slices.value_width, room.wide + kBlock * wide_row(slices.key_width));
    }
    alignas(64) float scores[kRows * kBlock];
#if defined(__AVX512BF16__)
    const bool paired = cache.format != Format::fp32;
    if (paired)
        scores_bf16(item, query, keys, count, slices.key_width, scores);
    else
#endif
        scores_fp32(item, query, keys, count, slices.key_width, scores);

    for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * kBlock;
        const int64_t seen = smaller(count, positions[r / item.heads] + 1 - start);
        const Vec never = splat(-__builtin_inff());
        Vec tops = never, total = {};
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            Vec x = lane_numbers() + static_cast<int32_t>(i) < static_cast<int32_t>(seen) ? load(row + i) * scale : never;
            tops = max(tops, x);
            store(row + i, x);
        }
        const float top = max(tops);
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            Vec p = seen > 0 ? exp(load(row + i) - top) : Vec{};
            store(row + i, p);
            total += p;
        }
        out.top[r] = top;
        out.weight[r] = sum(total);
    }

#if defined(__AVX512BF16__)
    if (paired) return mix_bf16(rows, scores, values, count, slices.value_width, out.values, room.pairs);
#endif
    mix_fp32(rows, scores, values, count, slices.value_width, out.values);
}

// Row r of `into` becomes the sums over its blocks and those of `next`, which come later.
SHOAL_INLINE void merge_row(Partial into, Partial next, int64_t r, int64_t width) {
    const float top = into.top[r] > next.top[r] ? into.top[r] : next.top[r];
    const float old_share = exp(splat(into.top[r] - top))[0], new_share = exp(splat(next.top[r] - top))[0];
    float *to = into.values + r * width, *from = next.values + r * width;
    for (int64_t c = 0; c < width; c += kLanes)
        store_first(to + c, load_first(to + c, width - c) * old_share + load_first(from + c, width - c) * new_share, width - c);
    into.weight[r] = into.weight[r] * old_share + next.weight[r] * new_share;
    into.top[r] = top;
}

}  // namespace shoal::SHOAL_ISA
