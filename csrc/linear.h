// Products with packed matrices (src/shoal/kernels/packed.py): one tile of 16 rows with some tokens at a time.
//
// Quantized weights meet activations that are quantized on the fly: a group of each token to int8 with its own scale. A group's products are summed
// exactly, in int32; groups are added up in fp32 from the first to the last, whatever the number of tokens: a token's result does not
// depend on its neighbours.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vector.h"
#include "weights.h"

namespace shoal::SHOAL_ISA {

constexpr int64_t kParts = kTile / kLanes;  // registers of a tile's row numbers
constexpr int kUnroll = kLanes >= 8 ? 16 : 1;  // loops over registers; without wide ones the code would only grow
constexpr int64_t kTokens = 8;              // tokens at most that share one pass over a tile

typedef uint8_t ByteVec __attribute__((vector_size(4 * SHOAL_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * SHOAL_LANES)));
typedef int8_t SmallVec __attribute__((vector_size(SHOAL_LANES)));
typedef uint16_t WordVec __attribute__((vector_size(4 * SHOAL_LANES)));

template <class V>
SHOAL_INLINE V load_as(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

SHOAL_INLINE Vec from_bf16(const uint16_t* p) {
    return (Vec)(__builtin_convertvector(load_as<HalfVec>(p), IntVec) << 16);
}

SHOAL_INLINE Vec from_fp16(const uint16_t* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
    // Exponent and mantissa in the places of fp32's, then the difference of the biases as a factor: right for subnormals too.
    IntVec bits = __builtin_convertvector(load_as<HalfVec>(p), IntVec);
    Vec magnitude = (Vec)((bits & 0x7FFF) << 13) * 0x1p112f;
    return (Vec)((IntVec)magnitude | ((bits & 0x8000) << 16));
#endif
}

// 8-bit e4m3 the same way (NaN aside).
SHOAL_INLINE Vec from_fp8(const uint8_t* p) {
    // GCC 12 converts bytes one by one.
#if defined(__AVX512F__)
    const IntVec bits = (IntVec)_mm512_cvtepu8_epi32(load_as<__m128i>(p));
#elif defined(__AVX2__)
    const IntVec bits = (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(SHOAL_LANES)));
    const IntVec bits = __builtin_convertvector(load_as<Bytes>(p), IntVec);
#endif
    Vec magnitude = (Vec)((bits & 0x7F) << 20) * 0x1p120f;
    return (Vec)((IntVec)magnitude | ((bits & 0x80) << 24));
}

SHOAL_INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7FC0;
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

// Nearest e4m3, ties to even, saturating at 448.
SHOAL_INLINE uint8_t to_fp8(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint8_t sign = (bits >> 24) & 0x80;
    float magnitude = x < 0 ? -x : x;
    if (x != x) return sign | 0x7F;
    if (magnitude >= 448) return sign | 0x7E;
    if (magnitude < 0x1p-6f) {  // subnormals: steps of 2^-9; adding 1.5 * 2^(23 - 9) rounds to them
        float shifted = magnitude + 0x1.8p14f;
        uint32_t raw;
        memcpy(&raw, &shifted, 4);
        return sign | (raw & 0xF);
    }
    bits &= 0x7FFFFFFF;
    bits += 0x7FFFF + ((bits >> 20) & 1);
    return sign | ((bits >> 20) - ((127 - 7) << 3));
}

// acc + the products of four neighbouring columns: unsigned weights (row i: bytes 4i to 4i + 3) and four signed activations.
// Without VNNI pairs of products must fit 16 bits: weights up to 15 do, so bytes come as two halves (kWholeBytes).
#if defined(__AVX512VNNI__)
constexpr bool kWholeBytes = true;
SHOAL_INLINE IntVec dot(IntVec acc, ByteVec weights, int32_t four) {
    return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(four));
}
#elif defined(__AVX512BW__)
constexpr bool kWholeBytes = false;
SHOAL_INLINE IntVec dot(IntVec acc, ByteVec weights, int32_t four) {
    __m512i pairs = _mm512_maddubs_epi16((__m512i)weights, _mm512_set1_epi32(four));
    return acc + (IntVec)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#elif defined(__AVX2__)
constexpr bool kWholeBytes = false;
SHOAL_INLINE IntVec dot(IntVec acc, ByteVec weights, int32_t four) {
    __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(four));
    return acc + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#else
constexpr bool kWholeBytes = true;
SHOAL_INLINE IntVec dot(IntVec acc, ByteVec weights, int32_t four) {
    int8_t x[4];
    memcpy(x, &four, 4);
    const IntVec fours = (IntVec)weights;
    return acc + (fours & 255) * x[0] + (fours >> 8 & 255) * x[1] + (fours >> 16 & 255) * x[2] + (fours >> 24 & 255) * x[3];
}
#endif

// Tokens as a matrix takes them: floats, and their quantized copy.
struct Inputs {
    const float* floats;
    int64_t stride;
    const int8_t* quants;  // [tokens, width], width = columns padded to whole groups
    const float* scales;   // [tokens, width / group]
    const int32_t* sums;   // of a group's quants, likewise
    int64_t width, group;

    SHOAL_INLINE_MEMBER Inputs from(int64_t token) const {
        Inputs rest = *this;
        rest.floats += token * stride;
        if (group) rest.quants += token * width, rest.scales += token * (width / group), rest.sums += token * (width / group);
        return rest;
    }
};

// Keeps the compiler from fusing a product into a following sum: the rounding is part of the specification.
#if defined(__AVX512F__)
#define SHOAL_ROUNDED(x) asm("" : "+v"(x))
#elif defined(__x86_64__) && defined(__AVX2__)
#define SHOAL_ROUNDED(x) asm("" : "+x"(x))
#else
#define SHOAL_ROUNDED(x) asm("" : "+m"(x))
#endif

// One group of a token: round(x / s) with s = max |x| / 127. Where some x is not finite, s is NaN, and with it every product.
SHOAL_INLINE void quantize_group(const float* x, int64_t present, int64_t group, int8_t* quants, float* scale, int32_t* sum_out) {
    IntVec largest = {};  // magnitudes as integers, which are ordered like the floats, with infinity and NaN above all numbers
    for (int64_t c = 0; c < present; c += kLanes) {
        IntVec magnitude = (IntVec)load_first(x + c, present - c) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    int32_t bits = 0;
    for (int64_t i = 0; i < kLanes; ++i) bits = largest[i] > bits ? largest[i] : bits;
    float top;
    memcpy(&top, &bits, 4);
    if (bits >= 0x7F800000) {
        memset(quants, 0, group);
        *scale = __builtin_nanf(""), *sum_out = 0;
        return;
    }
    float inverse = top > 0 ? 127.0f / top : 0;
    const float round = 12582912.0f;  // 1.5 * 2^23
    IntVec total = {};
    for (int64_t c = 0; c < group; c += kLanes) {
        Vec v = c < present ? load_first(x + c, present - c) : Vec{};
        Vec scaled = v * inverse;
        SHOAL_ROUNDED(scaled);
        IntVec q = (IntVec)(scaled + round) - 0x4B400000;
        total += q;
        SmallVec small = __builtin_convertvector(q, SmallVec);
        memcpy(quants + c, &small, sizeof small);
    }
    int32_t sums = 0;
    for (int64_t i = 0; i < kLanes; ++i) sums += total[i];
    *scale = top / 127.0f;
    *sum_out = sums;
}

// [T, 16] of one tile. Lines: bytes of 4 columns and 16 rows each.
template <int T, bool kFour, int kGroup>
__attribute__((noinline)) static void integer_tile(const Matrix& w, int64_t tile, const Inputs& x, float* out) {
    constexpr int kQuads = kGroup / 4;  // columns in fours
    constexpr int kSplit = !kFour && !kWholeBytes ? 2 : 1;
    const int64_t groups = x.width / kGroup, bytes = kGroup * kTile / (kFour ? 2 : 1);
    const uint8_t* line = w.data + tile * groups * bytes;
    const uint16_t* scales = w.scales + tile * groups * kTile;
    Vec acc[T][kParts] = {};
    for (int64_t g = 0; g < groups; ++g, line += bytes) {
#pragma GCC unroll kUnroll
        for (int p = 0; p < kParts; ++p) {
            ByteVec weights[kQuads * kSplit];
            if constexpr (kFour) {
#pragma GCC unroll kUnroll
                for (int c = 0; c < kQuads / 2; ++c) {
                    __builtin_prefetch(line + 64 * c + 4096);
                    ByteVec both = load_as<ByteVec>(line + 64 * c + 4 * kLanes * p);
                    weights[2 * c] = both & 15;
                    weights[2 * c + 1] = (ByteVec)((WordVec)both >> 4) & 15;
                }
            } else {
#pragma GCC unroll kUnroll
                for (int c = 0; c < kQuads; ++c) {
                    __builtin_prefetch(line + 64 * c + 4096);
                    ByteVec bytes_ = load_as<ByteVec>(line + 64 * c + 4 * kLanes * p);
                    if constexpr (kSplit == 2) {
                        weights[2 * c] = bytes_ & 15;
                        weights[2 * c + 1] = (ByteVec)((WordVec)bytes_ >> 4) & 15;
                    } else {
                        weights[c] = bytes_;
                    }
                }
            }
            __builtin_prefetch(scales + g * kTile + 512);
            Vec scale = from_fp16(scales + g * kTile + p * kLanes);
#pragma GCC unroll kUnroll
            for (int t = 0; t < T; ++t) {
                const int8_t* q = x.quants + t * x.width + g * kGroup;
                const int64_t at = t * groups + g;
                IntVec sum = IntVec{} + x.sums[at] * (kFour ? -8 : -128);
                IntVec high = {};
#pragma GCC unroll kUnroll
                for (int k = 0; k < kQuads; ++k) {
                    int32_t four;
                    memcpy(&four, q + 4 * k, 4);
                    if constexpr (kSplit == 2) {
                        sum = dot(sum, weights[2 * k], four);
                        high = dot(high, weights[2 * k + 1], four);
                    } else {
                        sum = dot(sum, weights[k], four);
                    }
                }
                if constexpr (kSplit == 2) sum += high << 4;
                acc[t][p] += __builtin_convertvector(sum, Vec) * (scale * x.scales[at]);
            }
        }
    }
#pragma GCC unroll kUnroll
    for (int t = 0; t < T; ++t)
        for (int p = 0; p < kParts; ++p) store(out + t * kTile + p * kLanes, acc[t][p]);
}

// [S, T, 16] of `S` neighbouring tiles.
template <int T, int S, bool kShort>
__attribute__((noinline)) static void float_tiles(const Matrix& w, int64_t tile, const Inputs& x, float* out) {
    const int64_t size = kShort ? 2 : 4, tile_bytes = w.columns * kTile * size;
    const uint8_t* line = w.data + tile * tile_bytes;
    Vec acc[S][T][kParts] = {};
    for (int64_t k = 0; k < w.columns; ++k, line += kTile * size)
#pragma GCC unroll kUnroll
        for (int s = 0; s < S; ++s)
#pragma GCC unroll kUnroll
            for (int p = 0; p < kParts; ++p) {
                const uint8_t* at = line + s * tile_bytes + p * kLanes * size;
                Vec weight = kShort ? from_bf16(reinterpret_cast<const uint16_t*>(at)) : load(reinterpret_cast<const float*>(at));
#pragma GCC unroll kUnroll
                for (int t = 0; t < T; ++t) acc[s][t][p] += weight * x.floats[t * x.stride + k];
            }
    for (int s = 0; s < S; ++s)
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < kParts; ++p) store(out + (s * T + t) * kTile + p * kLanes, acc[s][t][p]);
}

// Tiles at once: sums of different tiles and tokens do not wait for each other, and there are registers for 8 of them.
template <int T>
constexpr int kTogether = T * kParts > 4 ? 1 : T * kParts > 2 ? 2 : 4;

template <int T, int S>
static int64_t float_products_of(const Matrix& w, int64_t tile, int64_t end, const Inputs& x, float* out) {
    if constexpr (S > 1)
        if (tile + S > end) return float_products_of<T, S / 2>(w, tile, end, x, out);
    w.format == Format::bf16 ? float_tiles<T, S, true>(w, tile, x, out) : float_tiles<T, S, false>(w, tile, x, out);
    return S;
}

// [S, T, 16] of S tiles from `tile` on; returns S.
template <int T>
static int64_t products_of(const Matrix& w, int64_t tile, int64_t end, const Inputs& x, float* out) {
    if (!w.quantized()) return float_products_of<T, kTogether<T>>(w, tile, end, x, out);
    const bool four = w.format == Format::int4;
    if (w.group == 32)
        four ? integer_tile<T, true, 32>(w, tile, x, out) : integer_tile<T, false, 32>(w, tile, x, out);
    else
        four ? integer_tile<T, true, 64>(w, tile, x, out) : integer_tile<T, false, 64>(w, tile, x, out);
    return 1;
}

// done(token, first row, products [16]) for the rows of tiles [begin, end) and tokens [0, tokens).
template <class Done>
SHOAL_INLINE void multiply_tiles(const Matrix& w, int64_t begin, int64_t end, const Inputs& x, int64_t tokens, Done done) {
    alignas(64) float out[kTokens * kTile];
    // Tokens outside: a few of them stay in the nearest cache while the tiles of the item stream past.
    for (int64_t t = 0; t < tokens;) {
        const int64_t left = tokens - t, taken = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const Inputs part = x.from(t);
        for (int64_t tile = begin, made = 0; tile < end; tile += made) {
            if (taken == 8) made = products_of<8>(w, tile, end, part, out);
            if (taken == 4) made = products_of<4>(w, tile, end, part, out);
            if (taken == 2) made = products_of<2>(w, tile, end, part, out);
            if (taken == 1) made = products_of<1>(w, tile, end, part, out);
            for (int64_t s = 0; s < made; ++s)
                for (int64_t n = 0; n < taken; ++n) done(t + n, (tile + s) * kTile, out + (s * taken + n) * kTile);
        }
        t += taken;
    }
}

}  // namespace shoal::SHOAL_ISA
