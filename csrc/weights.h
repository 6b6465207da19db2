// What the engine's kernels compute with: a model's weights in the packed layout (src/shoal/kernels/packed.py), its cache, one step's tokens.
// Plain data, shared by all instruction sets. Every pointer stays owned by whoever made it.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace shoal {

enum class Format : int32_t { fp32, bf16, int8, int4, fp8 };  // fp8 (e4m3): caches only

constexpr int64_t kTile = 16;   // rows of a tile of a packed matrix
constexpr int64_t kPage = 32;   // positions of a cache page
constexpr int64_t kBlock = 128;  // positions whose attention is summed up at once; blocks are merged in order

// [leading, rows, columns], packed. data == nullptr: there is none.
struct Matrix {
    Format format = Format::fp32;
    int64_t leading = 1, rows = 0, columns = 0, group = 0;
    const uint8_t* data = nullptr;
    const uint16_t* scales = nullptr;           // fp16
    int64_t data_stride = 0, scale_stride = 0;  // bytes and numbers from one leading index to the next

    SHOAL_INLINE_MEMBER explicit operator bool() const { return data; }
    SHOAL_INLINE_MEMBER bool quantized() const { return format == Format::int8 || format == Format::int4; }
    SHOAL_INLINE_MEMBER int64_t tiles() const { return (rows + kTile - 1) / kTile; }
    SHOAL_INLINE_MEMBER int64_t tile_bytes() const { return data_stride / (tiles() > 0 ? tiles() : 1); }
    SHOAL_INLINE_MEMBER Matrix at(int64_t index) const {
        Matrix one = *this;
        one.leading = 1;
        one.data += index * data_stride;
        if (scales) one.scales += index * scale_stride;
        return one;
    }
};

struct FeedForward {
    Matrix gate, up, down;
};

struct Layer {
    const float *input_norm = nullptr, *post_norm = nullptr;
    // MLA: q_a (optional) and q, kv_a; k_up [H, R, N] and v_up [H, V, R]. GQA: q, k, v with optional biases.
    Matrix q_a, q, kv_a, k_up, v_up, k, v, o;
    const float *q_a_norm = nullptr, *kv_a_norm = nullptr, *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr;
    const float* value_embedding = nullptr;  // [V, R] (MLA) or [V, values of all heads]: joins the latent, or the values; null: none
    // A dense layer has `dense`; a mixture has router and experts, and its shared experts in `dense`.
    FeedForward dense, experts;
    Matrix router;
    const float* router_bias = nullptr;
    int64_t mixture = -1;  // of the main model's mixtures: its row of the experts that a step hands out
    // MTP modules only.
    Matrix join;
    const float *embedding_norm = nullptr, *hidden_norm = nullptr, *head_norm = nullptr;
};

struct Model {
    int64_t hidden, vocabulary, heads;
    bool latent;                         // MLA, else GQA
    int64_t nope, rope, value, rank;     // MLA: widths of a head, and of the latent
    int64_t q_rank;                      // 0: queries are not compressed
    int64_t kv_heads, head;              // GQA
    float softmax_scale, norm_eps, latent_norm_eps, qk_norm_eps;  // qk_norm_eps 0: no norm on queries and keys
    float softcap;                       // 0: none
    int64_t experts, per_token, groups, open_groups;
    bool sigmoid, biased, normalise;     // scores; bias and top-2 group scores (noaux_tc); weights of a token sum to 1
    float routed_scale;
    int64_t group;                       // columns of a quantization group; 0: no matrix is quantized
    const uint8_t* embedding;
    Format embedding_format;
    const float* norm;
    Matrix head_matrix;
    const Layer* layers;
};

// [layers, pages, kPage, width], and some numbers more at the end, so that whole registers can be read.
struct Cache {
    uint8_t* data;
    Format format;  // fp32, bf16 or fp8
    int64_t pages, width;
};

// New tokens of several sequences, end to end.
struct Step {
    int64_t tokens, sequences;
    const int64_t *ids, *positions, *starts;  // starts [sequences + 1]
    const int64_t* next_ids;                  // MTP: the tokens that follow
    const int32_t* tables;                    // page numbers [sequences, table_width]
    int64_t table_width;
    const float *cos, *sin;  // [positions, rope width / 2]
    Cache cache;
};

// Working memory that grows and is kept.
struct Workspace {
    uint8_t* data = nullptr;
    int64_t size = 0;
};

}  // namespace shoal
