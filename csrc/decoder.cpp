// One step of the engine: every layer over the new tokens of all sequences, in one parallel region.
#include "feed_forward.h"

namespace shoal::SHOAL_ISA {

SHOAL_INLINE void normalise(const float* x, const float* weight, float eps, int64_t width, float* y) {
    Vec squares = {};
    for (int64_t c = 0; c < width; c += kLanes) {
        Vec v = load_first(x + c, width - c);
        squares += v * v;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / width + eps);
    for (int64_t c = 0; c < width; c += kLanes) {
        Vec v = load_first(x + c, width - c) * factor;
        store_first(y + c, weight ? v * load_first(weight + c, width - c) : v, width - c);
    }
}

SHOAL_INLINE void add(const float* x, int64_t width, float* to) {
    for (int64_t c = 0; c < width; c += kLanes) store_first(to + c, load_first(to + c, width - c) + load_first(x + c, width - c), width - c);
}

// Turns pairs (2i, 2i + 1), or (i, i + width / 2), in place.
SHOAL_INLINE void turn(float* x, const float* cos, const float* sin, int64_t width, bool neighbours) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        float *a = x + (neighbours ? 2 * i : i), *b = x + (neighbours ? 2 * i + 1 : i + half);
        const float left = *a, right = *b;
        *a = left * cos[i] - right * sin[i];
        *b = right * cos[i] + left * sin[i];
    }
}

SHOAL_INLINE void write_cached(const Cache& cache, int64_t layer, int64_t page, int64_t offset, int64_t first, const float* x, int64_t count) {
    const int64_t at = ((layer * cache.pages + page) * kPage + offset) * cache.width + first;
    for (int64_t i = 0; i < count; ++i) {
        if (cache.format == Format::fp32) memcpy(cache.data + (at + i) * 4, x + i, 4);
        if (cache.format == Format::fp8) cache.data[at + i] = to_fp8(x[i]);
        if (cache.format == Format::bf16) {
            const uint16_t bits = to_bf16(x[i]);
            memcpy(cache.data + (at + i) * 2, &bits, 2);
        }
    }
}

SHOAL_INLINE void embed(const Model& model, int64_t id, float* to) {
    const int64_t D = model.hidden;
    for (int64_t c = 0; c < D; ++c) {
        if (model.embedding_format == Format::fp32) {
            memcpy(to + c, model.embedding + (id * D + c) * 4, 4);
        } else {
            uint16_t bits;
            memcpy(&bits, model.embedding + (id * D + c) * 2, 2);
            const uint32_t wide = uint32_t{bits} << 16;
            memcpy(to + c, &wide, 4);
        }
    }
}

// Matrices that share their inputs, as one list of work.
struct Product {
    const Matrix* w;
    const float* bias;
    int64_t column;  // of the output row
};

template <int N>
SHOAL_INLINE void project(Member& me, const Product (&products)[N], const Inputs& x, int64_t tokens, float* out, int64_t stride) {
    const int64_t taken = tiles_per_item(*products[0].w, me.size());
    int64_t all = 0, ends[N];
    for (int i = 0; i < N; ++i) ends[i] = all += blocks_of(taken, products[i].w->tiles());
    me.each(all, [&](int64_t item) {
        int i = 0;
        while (item >= ends[i]) ++i;
        const Product& p = products[i];
        const int64_t tile = (item - (i ? ends[i - 1] : 0)) * taken;
        multiply_tiles(*p.w, tile, smaller(tile + taken, p.w->tiles()), x, tokens, [&](int64_t t, int64_t row, const float* from) {
            const int64_t count = smaller(kTile, p.w->rows - row);
            float* to = out + t * stride + p.column + row;
            for (int64_t c = 0; c < count; c += kLanes) {
                const Vec y = load(from + c);
                store_first(to + c, p.bias ? y + load_first(p.bias + row + c, count - c) : y, count - c);
            }
        });
    });
}

// One step over some layers.
struct Walk {
    const Model& model;
    const Step& step;
    const Buffers& b;

    const int32_t* table_of(int64_t token) const {
        int64_t s = 0;
        while (token >= step.starts[s + 1]) ++s;
        return step.tables + s * step.table_width;
    }

    void cache(int64_t layer, int64_t token, int64_t first, const float* x, int64_t count) const {
        const int64_t position = step.positions[token];
        write_cached(step.cache, layer, table_of(token)[position / kPage], position % kPage, first, x, count);
    }

    // MLA (2405.04434, section 2.1): fills the cache, b.nope and, behind each head's `nope` columns of b.projected, its turned rope part.
    void latent_projections(Member& me, const Layer& layer, int64_t number) const {
        const int64_t T = step.tokens, H = model.heads, N = model.nope, P = model.rope, R = model.rank, W = b.projected_width;
        const int64_t kv = kv_column(model);
        if (layer.q_a) {
            const Product down[] = {{&layer.q_a, nullptr, 0}, {&layer.kv_a, nullptr, kv}};
            project(me, down, b.normed.from(0), T, b.projected, W);
            me.each(T, [&](int64_t t) {
                normalise(b.projected + t * W, layer.q_a_norm, model.latent_norm_eps, layer.q_a.rows, b.q_latent.row(t));
                b.q_latent.quantize(t);
            });
            const Product up[] = {{&layer.q, nullptr, 0}};
            project(me, up, b.q_latent.from(0), T, b.projected, W);
        } else {
            const Product both[] = {{&layer.q, nullptr, 0}, {&layer.kv_a, nullptr, kv}};
            project(me, both, b.normed.from(0), T, b.projected, W);
        }
        me.each(T * (H + 1), [&](int64_t item) {
            const int64_t t = item / (H + 1), h = item % (H + 1), position = step.positions[t];
            const float *cos = step.cos + position * (P / 2), *sin = step.sin + position * (P / 2);
            float* row = b.projected + t * W;
            if (h < H) {
                float* q = row + h * (N + P);
                if (model.qk_norm_eps > 0) normalise(q, nullptr, model.qk_norm_eps, N + P, q);
                turn(q + N, cos, sin, P, true);
                b.nope.set(h * T + t, q);
                return;
            }
            float *latent = row + kv, *rotary = latent + R;
            if (layer.value_embedding) add(layer.value_embedding + step.ids[t] * R, R, latent);
            normalise(latent, layer.kv_a_norm, model.latent_norm_eps, R, latent);
            if (model.qk_norm_eps > 0) normalise(rotary, nullptr, model.qk_norm_eps, P, rotary);
            turn(rotary, cos, sin, P, true);
            cache(number, t, 0, latent, R + P);
        });
    }

    // The absorbed queries of tokens [begin, end): fills b.queries [end - begin, H, R + P].
    void absorb(Member& me, const Layer& layer, int64_t begin, int64_t end) const {
        const int64_t T = step.tokens, H = model.heads, N = model.nope, P = model.rope, R = model.rank, key = R + P;
        const int64_t tiles = layer.k_up.tiles(), taken = larger(1, smaller(tiles, H * tiles / (me.size() * 6))), parts = blocks_of(taken, tiles);
        me.each(H * parts, [&](int64_t item) {
            const int64_t h = item / parts, tile = item % parts * taken;
            float* queries = b.queries + h * key;
            multiply_tiles(layer.k_up.at(h), tile, smaller(tile + taken, tiles), b.nope.from(h * T + begin), end - begin,
                           [&](int64_t t, int64_t r, const float* from) {
                               memcpy(queries + t * H * key + r, from, smaller(kTile, R - r) * 4);
                           });
            for (int64_t t = begin; tile == 0 && t < end; ++t)
                memcpy(queries + (t - begin) * H * key + R, b.projected + t * b.projected_width + h * (N + P) + N, P * 4);
        });
    }

    // GQA (2305.13245): fills the cache and b.queries [T, H, C].
    void grouped_queries(Member& me, const Layer& layer, int64_t number) const {
        const int64_t T = step.tokens, H = model.heads, G = model.kv_heads, C = model.head, W = b.projected_width;
        const Product all[] = {{&layer.q, layer.q_bias, 0}, {&layer.k, layer.k_bias, H * C}, {&layer.v, layer.v_bias, (H + G) * C}};
        project(me, all, b.normed.from(0), T, b.projected, W);
        me.each(T * (H + 2 * G), [&](int64_t item) {
            const int64_t t = item / (H + 2 * G), h = item % (H + 2 * G), position = step.positions[t];
            float* x = b.projected + t * W + h * C;
            if (h < H + G) {
                if (model.qk_norm_eps > 0) normalise(x, nullptr, model.qk_norm_eps, C, x);
                turn(x, step.cos + position * (C / 2), step.sin + position * (C / 2), C, false);
            } else if (layer.value_embedding) {
                add(layer.value_embedding + (step.ids[t] * G + h - H - G) * C, C, x);
            }
            if (h < H)
                memcpy(b.queries + (t * H + h) * C, x, C * 4);
            else
                cache(number, t, (h - H) * C, x, C);
        });
    }

    Slices slices(const Queries& item) const {
        if (model.latent) return {0, model.rank + model.rope, 0, model.rank};
        return {item.kv_head * model.head, model.head, (model.kv_heads + item.kv_head) * model.head, model.head};
    }

    // One block of an item; b.queries start with those of token `first`.
    void attend(const Member& me, const Queries& item, int64_t first, int64_t number, int64_t block, Partial out) const {
        const int64_t key = key_width_of(model), bytes = step.cache.format == Format::fp32 ? 4 : step.cache.format == Format::bf16 ? 2 : 1;
        const float* query[kRows];
        for (int64_t r = 0; r < item.rows(); ++r)
            query[r] = b.queries + ((item.token - first + r / item.heads) * model.heads + item.head + r % item.heads) * key;
        const uint8_t* layer = step.cache.data + number * step.cache.pages * kPage * step.cache.width * bytes;
        attend_block(item, query, step.positions + item.token, step.cache, layer, slices(item), model.softmax_scale, block, out,
                     {b.pairs + me.index() * pairs_size(model), b.block + me.index() * wide_size(model, step.cache)});
    }

    // The finished row r of an item, to where it is used next.
    void finish(const Queries& item, Partial sums, int64_t r) const {
        const int64_t width = value_width_of(model), t = item.token + r / item.heads, h = item.head + r % item.heads;
        float *from = sums.values + r * width, *to = model.latent ? from : b.heads.row(t) + h * width;
        const float factor = 1.0f / sums.weight[r];
        for (int64_t c = 0; c < width; c += kLanes) store_first(to + c, load_first(from + c, width - c) * factor, width - c);
        if (model.latent) b.mixed.set(h * step.tokens + t, to);
    }

    // Items [begin, end), whose queries are in b.queries.
    void attend_all(Member& me, int64_t begin, int64_t end, int64_t number) const {
        const int64_t width = value_width_of(model), first = b.items[begin].token;
        if (!b.divided)
            return me.each(end - begin, [&](int64_t i) {
                const Queries& item = b.items[begin + i];
                Partial sums = partial_at(b.partials, width, 2 * me.index()), next = partial_at(b.partials, width, 2 * me.index() + 1);
                for (int64_t n = 0; n < item.blocks; ++n) {
                    attend(me, item, first, number, n, n ? next : sums);
                    for (int64_t r = 0; n && r < item.rows(); ++r) merge_row(sums, next, r, width);
                }
                for (int64_t r = 0; r < item.rows(); ++r) finish(item, sums, r);
            });
        me.each(b.partial_count, [&](int64_t i) {
            int64_t n = 0;
            while (n + 1 < b.item_count && i >= b.items[n + 1].first_partial) ++n;
            attend(me, b.items[n], first, number, i - b.items[n].first_partial, partial_at(b.partials, width, i));
        });
        me.each(b.item_count * kRows, [&](int64_t i) {
            const Queries& item = b.items[i / kRows];
            const int64_t r = i % kRows;
            if (r >= item.rows()) return;
            Partial sums = partial_at(b.partials, width, item.first_partial);
            for (int64_t n = 1; n < item.blocks; ++n) merge_row(sums, partial_at(b.partials, width, item.first_partial + n), r, width);
            finish(item, sums, r);
        });
    }

    void attention(Member& me, const Layer& layer, int64_t number) const {
        const int64_t T = step.tokens, H = model.heads, V = head_width_of(model);
        if (model.latent)
            latent_projections(me, layer, number);
        else
            grouped_queries(me, layer, number);
        for (int64_t begin = 0; begin < b.item_count;) {
            const int64_t first = b.items[begin].token;
            int64_t end = begin, last = first;  // of items and of their tokens
            for (; end < b.item_count && b.items[end].token + b.items[end].tokens - first <= b.query_tokens; ++end)
                last = b.items[end].token + b.items[end].tokens;
            if (model.latent) absorb(me, layer, first, last);
            attend_all(me, begin, end, number);
            begin = end;
        }
        if (model.latent) {
            const int64_t tiles = layer.v_up.tiles();
            me.each(H, [&](int64_t h) {
                multiply_tiles(layer.v_up.at(h), 0, tiles, b.mixed.from(h * T), T, [&](int64_t t, int64_t row, const float* from) {
                    memcpy(b.heads.row(t) + h * V + row, from, smaller(kTile, V - row) * 4);
                });
            });
        }
        if (model.group) me.each(T, [&](int64_t t) { b.heads.quantize(t); });
        add_product(me, layer.o, b.heads.from(0));
    }

    // x += w inputs.
    void add_product(Member& me, const Matrix& w, const Inputs& inputs) const {
        const int64_t taken = tiles_per_item(w, me.size());
        me.each(blocks_of(taken, w.tiles()), [&](int64_t item) {
            const int64_t begin = item * taken;
            multiply_tiles(w, begin, smaller(begin + taken, w.tiles()), inputs, step.tokens, [&](int64_t t, int64_t row, const float* from) {
                add(from, smaller(kTile, w.rows - row), b.x.row(t) + row);
            });
        });
    }

    void normalise_all(Member& me, const float* weight) const {
        me.each(step.tokens, [&](int64_t t) {
            normalise(b.x.row(t), weight, model.norm_eps, model.hidden, b.normed.row(t));
            b.normed.quantize(t);
        });
    }

    void layer(Member& me, int64_t number, int32_t* experts) const {
        const Layer& layer = model.layers[number];
        normalise_all(me, layer.input_norm);
        attention(me, layer, number);
        normalise_all(me, layer.post_norm);
        if (experts && layer.mixture >= 0) experts += layer.mixture * step.tokens * model.per_token;
        feed_forward(me, model, layer, b, step.tokens, experts);
    }
};

// Memory of at least `size` bytes; what was in it is lost where it has to grow.
static uint8_t* room_for(int64_t size, Workspace& workspace) {
    if (size > workspace.size) {
        free(workspace.data);
        workspace.size = round_up(size, 4096);
        workspace.data = static_cast<uint8_t*>(aligned_alloc(4096, workspace.size));
        if (!workspace.data) abort();
    }
    return workspace.data;
}

static Buffers make_buffers(const Model& model, const Step& step, const Layer* layers, int64_t count, Workspace& workspace, int threads) {
    Arena measured(nullptr);
    take_buffers(measured, model, step, layers, count, threads);
    Arena arena(room_for(measured.used(), workspace));
    Buffers b = take_buffers(arena, model, step, layers, count, threads);
    int64_t partials;
    divide_queries(model, step, b.items, &partials);
    return b;
}

// body(member) on every thread.
template <class Body>
SHOAL_INLINE void in_parallel(int threads, Body body) {
    Team team(threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        team.size = omp_get_num_threads();  // the runtime may give fewer
        Member me(team, omp_get_thread_num());
        body(me);
    }
}

// hidden [T, D] after the final norm; experts [mixtures of the main model, T, K] or null.
void decoder_forward(const Model& model, int64_t layers, const Step& step, float* hidden, int32_t* experts, Workspace& workspace, int threads) {
    const Buffers b = make_buffers(model, step, model.layers, layers, workspace, threads);
    const Walk walk = {model, step, b};
    in_parallel(threads, [&](Member& me) {
        me.each(step.tokens, [&](int64_t t) { embed(model, step.ids[t], b.x.row(t)); });
        for (int64_t i = 0; i < layers; ++i) walk.layer(me, i, experts);
        me.each(step.tokens,
                [&](int64_t t) { normalise(b.x.row(t), model.norm, model.norm_eps, model.hidden, hidden + t * model.hidden); });
    });
}

// One MTP module (2412.19437, section 2.2): hidden [T, D] of the depth before and the token after each position -> hidden [T, D].
void decoder_draft(const Model& model, int64_t number, const Step& step, const float* previous, float* hidden, Workspace& workspace, int threads) {
    const Layer& layer = model.layers[number];
    const Buffers b = make_buffers(model, step, &layer, 1, workspace, threads);
    const Walk walk = {model, step, b};
    const int64_t D = model.hidden;
    in_parallel(threads, [&](Member& me) {
        me.each(step.tokens, [&](int64_t t) {
            float* row = b.joined.row(t);
            embed(model, step.next_ids[t], row);
            normalise(row, layer.embedding_norm, model.norm_eps, D, row);
            normalise(previous + t * D, layer.hidden_norm, model.norm_eps, D, row + D);
            b.joined.quantize(t);
            memset(b.x.row(t), 0, D * 4);
        });
        walk.add_product(me, layer.join, b.joined.from(0));
        walk.layer(me, number, nullptr);
        me.each(step.tokens, [&](int64_t t) { normalise(b.x.row(t), layer.head_norm, model.norm_eps, D, hidden + t * D); });
    });
}

// y [tokens, rows] = w x, soft-capped where cap > 0.
void packed_linear(const Matrix& w, int64_t tokens, const float* x, float cap, float* y, Workspace& workspace, int threads) {
    const int64_t group = w.quantized() ? w.group : 0;
    Arena measured(nullptr);
    Activations::make(measured, tokens, w.columns, group);
    Arena arena(room_for(measured.used(), workspace));
    const Activations inputs = Activations::make(arena, tokens, w.columns, group);
    const int64_t taken = tiles_per_item(w, threads), items = blocks_of(taken, w.tiles());
    in_parallel(threads, [&](Member& me) {
        me.each(tokens, [&](int64_t t) {
            memcpy(inputs.row(t), x + t * w.columns, w.columns * 4);
            inputs.quantize(t);
        });
        me.each(w.leading * items, [&](int64_t item) {
            const int64_t e = item / items, begin = item % items * taken;
            multiply_tiles(w.at(e), begin, smaller(begin + taken, w.tiles()), inputs.from(0), tokens,
                           [&](int64_t t, int64_t row, const float* from) {
                               float* to = y + (e * tokens + t) * w.rows + row;
                               const int64_t count = smaller(kTile, w.rows - row);
                               if (cap > 0)
                                   for (int64_t c = 0; c < count; ++c) to[c] = cap * __builtin_tanhf(from[c] / cap);
                               else
                                   for (int64_t c = 0; c < count; c += kLanes) store_first(to + c, load(from + c), count - c);
                           });
        });
    });
}

}  // namespace shoal::SHOAL_ISA
