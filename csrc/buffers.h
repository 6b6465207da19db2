// The working memory of one step.
#pragma once
#include <sys/mman.h>

#include "paged_attention.h"

namespace shoal::SHOAL_ISA {

// Hands out pieces of one block of memory; a first pass without memory only adds up how much is needed.
class Arena {
  public:
    explicit Arena(uint8_t* data) : data_(data) {}
    template <class T>
    T* take(int64_t count) {
        uint8_t* start = data_ ? data_ + used_ : nullptr;
        used_ += round_up(count * sizeof(T), 64) + 64;  // rows of different arrays never share a cache line
        return reinterpret_cast<T*>(start);
    }
    int64_t used() const { return used_; }
    // Go on at an earlier place, for arrays that are never needed together with those taken since; or behind the longest of them.
    void resume(int64_t place) { used_ = place; }

  private:
    uint8_t* data_;
    int64_t used_ = 0;
};

// Rows of activations and, where the model's matrices are quantized, their quantized copy.
struct Activations {
    float* floats;
    int64_t columns, padded, group;
    int8_t* quants;
    float* scales;
    int32_t* sums;

    static Activations make(Arena& arena, int64_t rows, int64_t columns, int64_t group, bool with_floats = true) {
        Activations a = {};
        a.columns = columns, a.group = group, a.padded = group ? round_up(columns, group) : columns;
        if (with_floats) a.floats = arena.take<float>(rows * columns);
        if (group) {
            a.quants = arena.take<int8_t>(rows * a.padded);
            a.scales = arena.take<float>(rows * (a.padded / group));
            a.sums = arena.take<int32_t>(rows * (a.padded / group));
        }
        return a;
    }
    SHOAL_INLINE_MEMBER float* row(int64_t i) const { return floats + i * columns; }
    SHOAL_INLINE_MEMBER Inputs from(int64_t i) const { return Inputs{floats, columns, quants, scales, sums, padded, group}.from(i); }

    // The same memory for rows of another width, at most as wide.
    SHOAL_INLINE_MEMBER Activations narrowed(int64_t width) const {
        Activations a = *this;
        a.columns = width, a.padded = group ? round_up(width, group) : width;
        return a;
    }
    // Quantize a row whose floats have been written.
    SHOAL_INLINE_MEMBER void quantize(int64_t i) const { quantize(i, 0, columns, row(i)); }
    // Columns [begin, end) of row i become x, in the forms that are kept; begin is a multiple of the group.
    SHOAL_INLINE_MEMBER void set(int64_t i, int64_t begin, int64_t end, const float* x) const {
        if (floats) memcpy(row(i) + begin, x, (end - begin) * 4);
        quantize(i, begin, end, x);
    }
    SHOAL_INLINE_MEMBER void set(int64_t i, const float* x) const { set(i, 0, columns, x); }
    SHOAL_INLINE_MEMBER void copy(int64_t i, const Activations& other, int64_t j) const {
        if (floats) memcpy(row(i), other.row(j), columns * 4);
        if (!group) return;
        const int64_t groups = padded / group;
        memcpy(quants + i * padded, other.quants + j * padded, padded);
        memcpy(scales + i * groups, other.scales + j * groups, groups * 4);
        memcpy(sums + i * groups, other.sums + j * groups, groups * 4);
    }

  private:
    SHOAL_INLINE_MEMBER void quantize(int64_t i, int64_t begin, int64_t end, const float* x) const {
        if (!group) return;
        for (int64_t c = begin; c < end; c += group) {
            const int64_t g = i * (padded / group) + c / group;
            quantize_group(x + c - begin, smaller(group, columns - c), group, quants + i * padded + c, scales + g, sums + g);
        }
    }
};

// Everything a layer writes. T tokens, H heads, K experts of a token.
struct Buffers {
    int64_t slots;         // T * K
    Activations x;         // [T, D] the residual stream
    Activations normed;    // [T, D]
    Activations joined;    // [T, 2 D] MTP
    Activations q_latent;  // [T, q_lora_rank]
    float* projected;      // [T, all of q, kv_a (or k, v)]
    int64_t projected_width;
    Activations nope;    // [H, T, nope], as the model's matrices read it
    float* queries;      // [query_tokens, H, key width]
    int64_t query_tokens;
    float* partials;
    Activations mixed;    // [H, T, R] MLA: attention over the latent, divided by its weight; as the model's matrices read it
    Activations heads;    // [T, H * V]
    float* scores;        // [T, E]
    int32_t* chosen;      // [T, K]
    float* weights;       // [T, K]
    int64_t *expert_end, *slot_of;  // [E] ends of each expert's slots; [T, K] -> slot
    int32_t* token_of;    // [slots]
    int64_t *busy, *busy_count;  // [E] experts that have slots, and how many they are
    Activations gathered;  // [slots, D]
    Activations wide;     // [slots, F] experts' inner activations
    Activations dense;    // [T, width] of a layer without experts
    Activations shared;   // [T, width] of shared experts
    float* inner;         // [threads, kSlice, columns of one item]
    float* results;       // [threads, slots + T, columns of one item]
    uint16_t* pairs;      // [threads, pairs_size]
    Wide* block;          // [threads, wide_size]; see Room
    Queries* items;
    int64_t item_count, partial_count;
    bool divided;  // blocks of one item go to different threads
};

constexpr int64_t kResultBytes = 1 << 18;
constexpr int64_t kQueryTokens = 128;  // of a long prompt, whose absorbed queries (wider than the stream) exist at a time
constexpr int64_t kItemTiles = 16;  // at most, in one work item
constexpr int64_t kSlice = 64;      // tokens whose inner activations are in the making
constexpr int64_t kRun = kSlice / kTokens;  // items at most that few tokens pass at once: memory is read fastest in long stretches

// Tiles of one work item: every thread gets some of them, and they stay in its cache while the tokens pass.
SHOAL_INLINE int64_t tiles_per_item(const Matrix& w, int threads) {
    // Of floats as many as float_tiles takes at once, as far as every thread gets some.
    const int64_t together = w.quantized() ? 1 : smaller(kTogether<1>, blocks_of(threads, w.tiles()));
    const int64_t fair = larger(w.tiles() / (threads * 6), together), fitting = (int64_t{1} << 19) / larger(w.tile_bytes(), 1);
    return larger(1, smaller(fair, smaller(fitting, kItemTiles)));
}

// Where the latent starts among the projections of a token: behind its queries, compressed or not.
SHOAL_INLINE int64_t kv_column(const Model& model) { return larger(model.q_rank, model.heads * (model.nope + model.rope)); }
SHOAL_INLINE int64_t value_width_of(const Model& model) { return model.latent ? model.rank : model.head; }
SHOAL_INLINE int64_t key_width_of(const Model& model) { return model.latent ? model.rank + model.rope : model.head; }
SHOAL_INLINE int64_t head_width_of(const Model& model) { return model.latent ? model.value : model.head; }

// Numbers of one thread's pairs of value rows (a whole number of cache lines).
SHOAL_INLINE int64_t pairs_size(const Model& model) { return kBlock * round_up(value_width_of(model), 64); }
// Numbers of one thread's widened block.
SHOAL_INLINE int64_t wide_size(const Model& model, const Cache& cache) {
    if (cache.format == Format::fp32 || cache.format == kWide) return 0;
    return kBlock * (wide_row(key_width_of(model)) + (model.latent ? 0 : wide_row(value_width_of(model))));
}

// The queries of a step in items; with `items` null only counts.
static int64_t divide_queries(const Model& model, const Step& step, Queries* items, int64_t* partials) {
    const int64_t kv_heads = model.latent ? 1 : model.kv_heads, sharing = model.heads / kv_heads;
    const int64_t abreast = sharing < kRows ? kRows / sharing : 1;
    int64_t count = 0;
    *partials = 0;
    for (int64_t s = 0; s < step.sequences; ++s)
        for (int64_t t = step.starts[s]; t < step.starts[s + 1]; t += abreast)
            for (int64_t g = 0; g < kv_heads; ++g)
                for (int64_t h = 0; h < sharing; h += kRows) {
                    const int64_t tokens = smaller(abreast, step.starts[s + 1] - t);
                    const int64_t blocks = step.positions[t + tokens - 1] / kBlock + 1;
                    if (items)
                        items[count] = {t, tokens, g, g * sharing + h, smaller(kRows, sharing - h), step.tables + s * step.table_width,
                                        blocks, *partials};
                    ++count;
                    *partials += blocks;
                }
    return count;
}

static Buffers take_buffers(Arena& arena, const Model& model, const Step& step, const Layer* layers, int64_t layer_count, int threads) {
    Buffers b = {};
    const int64_t T = step.tokens, H = model.heads, D = model.hidden, group = model.group;
    int64_t wide = 0, dense = 0, shared = 0;
    bool mixture = false, joins = false;
    for (const Layer* layer = layers; layer < layers + layer_count; ++layer) {
        int64_t& width = layer->router ? shared : dense;
        width = larger(width, layer->dense.gate.rows);
        wide = larger(wide, layer->experts.gate.rows);
        mixture |= bool(layer->router);
        joins |= bool(layer->join);
    }
    const int64_t K = mixture ? model.per_token : 0, E = mixture ? model.experts : 0;
    // Whether a matrix of some layer reads floats; where none does, only the quantized copy is kept.
    auto plain = [&](auto matrix_of) {
        for (const Layer* layer = layers; layer < layers + layer_count; ++layer)
            if (const Matrix& w = matrix_of(*layer); w && !w.quantized()) return true;
        return false;
    };
    const bool plain_experts = plain([](const Layer& l) -> const Matrix& { return l.experts.gate; });
    const bool plain_inner = plain([](const Layer& l) -> const Matrix& { return l.experts.down; });
    const bool plain_dense = plain([](const Layer& l) -> const Matrix& { return l.dense.down; });
    b.slots = T * K;
    b.x = Activations::make(arena, T, D, 0);
    b.normed = Activations::make(arena, T, D, group);
    b.joined = Activations::make(arena, joins ? T : 0, 2 * D, group);
    const int64_t half = arena.used();

    // Attention. What it gives, `heads`, lies where its projections were.
    b.heads = Activations::make(arena, T, H * head_width_of(model), group);
    const int64_t heads = arena.used();
    arena.resume(half);
    b.q_latent = Activations::make(arena, T, model.q_rank, group);
    b.projected_width = model.latent ? kv_column(model) + model.rank + model.rope : (H + 2 * model.kv_heads) * model.head;
    b.projected = arena.take<float>(T * b.projected_width);
    b.nope = Activations::make(arena, model.latent ? H * T : 0, model.nope, group, plain([](const Layer& l) -> const Matrix& { return l.k_up; }));
    arena.resume(larger(heads, arena.used()));
    b.item_count = divide_queries(model, step, nullptr, &b.partial_count);
    // Few items: their blocks are spread over the threads. Many: an item's blocks stay on one thread and need no memory of their own.
    b.divided = b.item_count < 4 * threads;
    if (!b.divided) b.partial_count = 2 * threads;
    b.query_tokens = model.latent && !b.divided ? smaller(T, kQueryTokens) : T;
    b.queries = arena.take<float>(b.query_tokens * H * key_width_of(model));
    b.mixed = Activations::make(arena, model.latent ? H * T : 0, model.rank, group, plain([](const Layer& l) -> const Matrix& { return l.v_up; }));
    b.pairs = arena.take<uint16_t>(threads * pairs_size(model));
    b.block = arena.take<Wide>(threads * wide_size(model, step.cache));
    b.partials = arena.take<float>(b.partial_count * partial_size(value_width_of(model)));
    const int64_t attention = arena.used();

    // The feed-forward half, where attention's arrays were.
    arena.resume(half);
    b.scores = arena.take<float>(T * round_up(E, kTile));
    b.chosen = arena.take<int32_t>(T * K);
    b.weights = arena.take<float>(T * K);
    b.expert_end = arena.take<int64_t>(E);
    b.slot_of = arena.take<int64_t>(b.slots);
    b.token_of = arena.take<int32_t>(b.slots);
    b.busy = arena.take<int64_t>(E);
    b.busy_count = arena.take<int64_t>(1);
    const int64_t experts = arena.used();
    b.gathered = Activations::make(arena, b.slots, D, group, plain_experts);
    b.wide = Activations::make(arena, b.slots, wide, group, plain_inner);
    b.shared = Activations::make(arena, T, shared, group, plain_dense);
    const int64_t mixtures = arena.used();
    arena.resume(experts);
    b.dense = Activations::make(arena, T, dense, group, plain_dense);
    arena.resume(larger(mixtures, arena.used()));
    b.inner = arena.take<float>(threads * kSlice * kItemTiles * kTile);
    b.results = arena.take<float>(threads * larger((b.slots + T) * kTile, kResultBytes / 4));
    arena.resume(larger(attention, arena.used()));

    b.items = arena.take<Queries>(b.item_count);
    return b;
}

}  // namespace shoal::SHOAL_ISA
