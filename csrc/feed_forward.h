// The feed-forward half of a layer: SwiGLU, and the fused mixture of experts (2401.06066) with the router of DeepSeek-V2 and V3.
#pragma once
#include "buffers.h"
#include "team.h"

namespace shoal::SHOAL_ISA {

SHOAL_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(splat(-x))[0]); }

// scores [E] (logits on entry) -> the K best experts, best first, and their weights. The rules of model/moe.py's Router.
static void choose_experts(const Model& model, const float* bias, float* scores, int32_t* chosen, float* weights) {
    const int64_t E = model.experts, K = model.per_token, G = model.groups, size = E / G;
    if (model.sigmoid) {
        for (int64_t e = 0; e < E; ++e) scores[e] = sigmoid(scores[e]);
    } else {
        float top = scores[0], total = 0;
        for (int64_t e = 1; e < E; ++e) top = scores[e] > top ? scores[e] : top;
        for (int64_t e = 0; e < E; ++e) total += scores[e] = exp(splat(scores[e] - top))[0];
        for (int64_t e = 0; e < E; ++e) scores[e] /= total;
    }
    const float never = -__builtin_inff();
    float ranked[E], group_scores[G];
    for (int64_t e = 0; e < E; ++e) ranked[e] = scores[e] + (bias ? bias[e] : 0);
    if (model.open_groups < G) {
        for (int64_t g = 0; g < G; ++g) {
            float first = never, second = never;
            for (int64_t e = g * size; e < (g + 1) * size; ++e) {
                if (ranked[e] > first) {
                    second = first;
                    first = ranked[e];
                } else if (ranked[e] > second) {
                    second = ranked[e];
                }
            }
            group_scores[g] = model.biased ? first + second : first;
        }
        bool open[G];
        for (int64_t g = 0; g < G; ++g) open[g] = false;
        for (int64_t n = 0; n < model.open_groups; ++n) {
            int64_t best = -1;
            for (int64_t g = 0; g < G; ++g)
                if (!open[g] && (best < 0 || group_scores[g] > group_scores[best])) best = g;
            open[best] = true;
        }
        for (int64_t e = 0; e < E; ++e)
            if (!open[e / size]) ranked[e] = never;
    }
    float total = 0;
    bool taken[E];
    for (int64_t e = 0; e < E; ++e) taken[e] = false;
    for (int64_t k = 0; k < K; ++k) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; ++e)
            if (!taken[e] && (best < 0 || ranked[e] > ranked[best])) best = e;
        taken[best] = true;
        chosen[k] = static_cast<int32_t>(best);
        total += weights[k] = scores[best];
    }
    for (int64_t k = 0; k < K; ++k) {
        if (model.normalise) weights[k] /= total + 1e-20f;
        weights[k] *= model.routed_scale;
    }
}

// Slots: (token, choice) pairs sorted by expert, those of one expert in the order of their tokens.
static void sort_slots(const Model& model, int64_t tokens, const Buffers& b) {
    const int64_t E = model.experts, K = model.per_token;
    for (int64_t e = 0; e < E; ++e) b.expert_end[e] = 0;
    for (int64_t i = 0; i < tokens * K; ++i) ++b.expert_end[b.chosen[i]];
    int64_t total = 0;
    *b.busy_count = 0;
    for (int64_t e = 0; e < E; ++e) {  // for now: where the next slot of e goes
        const int64_t count = b.expert_end[e];
        if (count) b.busy[(*b.busy_count)++] = e;
        b.expert_end[e] = total;
        total += count;
    }
    for (int64_t i = 0; i < tokens * K; ++i) {
        const int64_t slot = b.expert_end[b.chosen[i]]++;
        b.slot_of[i] = slot;
        b.token_of[slot] = static_cast<int32_t>(i / K);
    }
}

// Tiles [begin, end) of silu(gate x) * (up x) for x [tokens]: columns of `out`, from row `first`. `inner`: room for [kSlice, the tiles' rows].
SHOAL_INLINE void gate_and_up(const FeedForward& f, int64_t begin, int64_t end, const Inputs& x, int64_t tokens, const Activations& out,
                              int64_t first, float* inner) {
    const int64_t start = begin * kTile, stop = smaller(end * kTile, out.columns), width = (end - begin) * kTile;
    for (int64_t slice = 0; slice < tokens; slice += kSlice) {
        const int64_t count = smaller(kSlice, tokens - slice);
        multiply_tiles(f.up, begin, end, x.from(slice), count,
                       [&](int64_t t, int64_t row, const float* p) { memcpy(inner + t * width + row - start, p, kTile * 4); });
        multiply_tiles(f.gate, begin, end, x.from(slice), count, [&](int64_t t, int64_t row, const float* p) {
            float* to = inner + t * width + row - start;
            for (int64_t i = 0; i < kTile; i += kLanes) {
                Vec gate = load(p + i);
                store(to + i, gate / (1.0f + exp(-gate)) * load(to + i));
            }
        });
        for (int64_t t = 0; t < count; ++t) out.set(first + slice + t, start, stop, inner + t * width);
    }
}

// x += feed-forward(normed); on every thread of the team.
static void feed_forward(Member& me, const Model& model, const Layer& layer, const Buffers& b, int64_t T, int32_t* experts_out) {
    const int64_t D = model.hidden, K = layer.router ? model.per_token : 0, E = layer.router ? model.experts : 0;
    const int64_t slots = T * K;
    if (E) {
        const int64_t stride = round_up(E, kTile);
        me.each(layer.router.tiles(), [&](int64_t tile) {
            multiply_tiles(layer.router, tile, tile + 1, b.normed.from(0), T,
                           [&](int64_t t, int64_t row, const float* p) { memcpy(b.scores + t * stride + row, p, kTile * 4); });
        });
        auto choose = [&](int64_t t) {
            choose_experts(model, layer.router_bias, b.scores + t * stride, b.chosen + t * K, b.weights + t * K);
            if (experts_out) memcpy(experts_out + t * K, b.chosen + t * K, K * 4);
        };
        if (T > 1) me.each(T, choose);
        me.each(1, [&](int64_t) {
            if (T == 1) choose(0);
            sort_slots(model, T, b);
        });
        if (T > 1) me.each(slots, [&](int64_t slot) { b.gathered.copy(slot, b.normed, b.token_of[slot]); });
    }
    auto begin_of = [&](int64_t e) { return e ? b.expert_end[e - 1] : int64_t{0}; };
    auto inputs_of = [&](int64_t e) { return T > 1 ? b.gathered.from(begin_of(e)) : b.normed.from(0); };

    const Activations dense = (E ? b.shared : b.dense).narrowed(layer.dense.gate.rows);

    // Items end at whole groups, so that each quantizes what it has computed.
    const int64_t unit = larger(model.group, kTile) / kTile;
    auto item_tiles = [&](const Matrix& w) { return round_up(tiles_per_item(w, me.size()), unit); };
    const int64_t wide_item = E ? item_tiles(layer.experts.gate) : 1, wide_tiles = layer.experts.gate.tiles();
    const int64_t wide_items = E ? blocks_of(wide_item, wide_tiles) : 0;
    const int64_t dense_tiles = layer.dense.gate.tiles(), dense_item = item_tiles(layer.dense.gate);
    const int64_t dense_items = layer.dense.gate ? blocks_of(dense_item, dense_tiles) : 0;
    float* inner = b.inner + me.index() * kSlice * kItemTiles * kTile;
    const int64_t busy = E ? *b.busy_count : 0;
    me.runs(busy * wide_items + dense_items, T <= kTokens ? kRun : 1, [&](int64_t item, int64_t end) {
        while (item < end) {
            const bool is_dense = item < dense_items;
            const int64_t number = is_dense ? 0 : (item - dense_items) / wide_items, items = is_dense ? dense_items : wide_items;
            const int64_t first = is_dense ? 0 : dense_items + number * wide_items, stop = smaller(first + items, end);
            const int64_t size = is_dense ? dense_item : wide_item, tiles = is_dense ? dense_tiles : wide_tiles;
            const int64_t tile = (item - first) * size, last = smaller((stop - first) * size, tiles);
            if (is_dense) {
                gate_and_up(layer.dense, tile, last, b.normed.from(0), T, dense, 0, inner);
            } else {
                const int64_t e = b.busy[number], slot = begin_of(e);
                const FeedForward expert = {layer.experts.gate.at(e), layer.experts.up.at(e), {}};
                gate_and_up(expert, tile, last, inputs_of(e), b.expert_end[e] - slot, b.wide, slot, inner);
            }
            item = stop;
        }
    });

    const int64_t tiles = blocks_of(kTile, D), room = kResultBytes / 4 / ((slots + T) * kTile);
    const int64_t taken = larger(smaller(tiles_per_item(E ? layer.experts.down : layer.dense.down, me.size()), room), 1);
    float* results = b.results + me.index() * larger((b.slots + T) * kTile, kResultBytes / 4);
    me.runs(blocks_of(taken, tiles), larger(room / taken, 1), [&](int64_t item, int64_t stop) {
        const int64_t begin = item * taken, end = smaller(stop * taken, tiles), first_row = begin * kTile, width = (end - begin) * kTile;
        auto keep = [&](int64_t first) {
            return [=](int64_t t, int64_t row, const float* p) { memcpy(results + (first + t) * width + row - first_row, p, kTile * 4); };
        };
        for (int64_t i = 0; i < busy; ++i) {
            const int64_t e = b.busy[i], slot = begin_of(e);
            multiply_tiles(layer.experts.down.at(e), begin, end, b.wide.from(slot), b.expert_end[e] - slot, keep(slot));
        }
        if (dense_items) multiply_tiles(layer.dense.down, begin, end, dense.from(0), T, keep(slots));
        for (int64_t t = 0; t < T; ++t)
            for (int64_t c = 0; c < width && first_row + c < D; c += kLanes) {
                Vec total = {};
                for (int64_t k = 0; k < K; ++k) total += load(results + b.slot_of[t * K + k] * width + c) * b.weights[t * K + k];
                if (dense_items) total += load(results + (slots + t) * width + c);
                float* to = b.x.row(t) + first_row + c;
                const int64_t left = D - first_row - c;
                store_first(to, load_first(to, left) + total, left);
            }
    });
}

}  // namespace shoal::SHOAL_ISA
