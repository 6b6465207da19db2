// Every kernel, as a table of functions. Each instruction set compiles its own table from the same sources; module.cpp picks one at load.
//
// Floats are fp32. "rows" are contiguous in the last dimension and `stride` apart. All results are the same, bit for bit, from run to
// run with the same number of threads: no atomics, and every sum has a fixed order.
#pragma once
#include <cstdint>

namespace shoal {

// Inlined by force: the linker would otherwise merge the copies of different instruction sets.
#define SHOAL_INLINE_MEMBER __attribute__((always_inline)) inline

// [rows, width], rows `stride` floats apart.
struct Rows {
    float* data;
    int64_t stride;
    SHOAL_INLINE_MEMBER float* operator[](int64_t row) const { return data + row * stride; }
};

// [B, T, H, width], the last dimension contiguous.
struct Heads {
    float* data;
    int64_t batch_stride, time_stride, head_stride;
    SHOAL_INLINE_MEMBER float* at(int64_t b, int64_t t, int64_t h) const {
        return data + b * batch_stride + t * time_stride + h * head_stride;
    }
};

struct RopeShape {
    int64_t batch, time, heads, width;
    int64_t table_batch_stride;  // 0: every sequence has the same positions
    bool interleaved;
};

struct AttentionShape {
    int64_t batch, time, heads, kv_heads, qk_width, v_width;
    float scale;
};

struct NewtonSchulz {
    float a, b, c;  // of the polynomial a x + b x^3 + c x^5
    int64_t steps;
};

// Which tokens followed which contexts (model/counted.py). Entries are sorted: a context's key, then, in its lowest `token_bits`, the token.
constexpr int64_t kMostOrders = 8;
struct CountedNgrams {
    const int64_t* entries;
    const int16_t* counts;
    int64_t size;
    const int64_t* index;  // where the entries begin whose bits above `index_shift` are 0, 1, ...; the last is `size`
    int64_t index_shift, token_bits;
    int64_t orders;          // contexts of 1, 2, ... tokens
    const float* discounts;  // [orders, 4]: what is taken off a count of 0, 1, 2, and 3 or more
    const float* base;       // [V], the distribution without a context
};

constexpr int64_t kMostRepeatLengths = 8;

struct Matrix;
struct Model;
struct Step;
struct Workspace;

struct Kernels {
    void (*rms_norm)(int64_t rows, int64_t width, Rows x, const float* weight, float eps, Rows y, int threads);
    void (*rms_norm_backward)(int64_t rows, int64_t width, Rows x, const float* weight, float eps, Rows grad, Rows grad_x,
                              float* grad_weight, int threads);

    void (*swiglu)(int64_t rows, int64_t width, Rows gate, Rows up, Rows y, int threads);
    void (*swiglu_backward)(int64_t rows, int64_t width, Rows gate, Rows up, Rows grad, Rows grad_gate, Rows grad_up, int threads);

    // Turns by the angle with cosine `cos` and sine `sin` [B or 1, T, width/2]; `direction` is 1, or -1 to turn back (the gradient).
    void (*rope)(RopeShape shape, Heads x, const float* cos, const float* sin, float direction, Heads y, int threads);

    // log_sum [B, H, T] is kept for the backward pass.
    void (*attention)(AttentionShape shape, Heads q, Heads k, Heads v, Heads y, float* log_sum, int threads);
    void (*attention_backward)(AttentionShape shape, Heads q, Heads k, Heads v, Heads y, const float* log_sum, Heads grad, Heads grad_q,
                               Heads grad_k, Heads grad_v, int threads);

    // nats[row] of each row of logits; `with_grad` overwrites logits with d nats / d logits. softcap 0: none. target -100: ignored.
    void (*cross_entropy)(int64_t rows, int64_t vocab, Rows logits, const int64_t* targets, float softcap, bool with_grad, float* nats,
                          int threads);

    // Of the candidates of each row, tokens [rows, count] with the target first: logits = hidden . weight[token] + more (may be null), and
    // log_sum, the logarithm of the sum of exp(logits + log_weights). losses[row] = log_sum - the sum of shares * logits, nats[row] =
    // log_sum - the target's logit; grad_logits [rows, count] and grad_hidden [rows, width] are those of the sum of losses.
    void (*sampled_cross_entropy)(int64_t rows, int64_t count, int64_t width, Rows hidden, const float* weight, const int64_t* tokens,
                                  const float* log_weights, const float* shares, const float* more, float* losses, float* nats,
                                  float* grad_logits, Rows grad_hidden, int threads);
    // y[tokens[r, c]] += factors[r, c] * x[r], for y [vocab, width].
    void (*add_to_rows)(int64_t rows, int64_t count, int64_t width, const float* factors, const int64_t* tokens, Rows x, int64_t vocab,
                        float* y, int threads);

    // y[n] = sum over k of weights[n, k] * x[index[n, k]]; without weights a plain sum.
    void (*combine)(int64_t tokens, int64_t per_token, int64_t width, Rows x, const float* weights, const int64_t* index, Rows y,
                    int threads);
    void (*combine_backward)(int64_t tokens, int64_t per_token, int64_t width, Rows x, const float* weights, const int64_t* index,
                             Rows grad, Rows grad_x, float* grad_weights, int threads);

    // For rows sorted by group, those of group g up to ends[g]: y [R, width] = x [R, depth] times weight[g] [depth, width], or, `transposed`,
    // the transpose of weight[g] [width, depth].
    void (*grouped_product)(int64_t groups, const int32_t* ends, int64_t depth, int64_t width, Rows x, const float* weight, bool transposed,
                            Rows y, int threads);
    // y[g] [height, width] = the transpose of group g's rows of grad [R, height], times those of x [R, width]; with `add` it comes
    // on top of what is in y.
    void (*grouped_outer)(int64_t groups, const int32_t* ends, int64_t height, int64_t width, Rows grad, Rows x, float* y, bool add,
                          int threads);

    // Each matrix of x [batch, rows, columns], divided by its Frobenius norm, after the steps.
    void (*newton_schulz)(int64_t batch, int64_t rows, int64_t columns, const float* x, NewtonSchulz iteration, float* y, int threads);

    // winners[r] = the token drawn from row index[r] of logits at temperatures[r], with random numbers that begin at starts[r]; -1 where
    // the row has no finite maximum.
    void (*draw)(int64_t rows, int64_t vocab, Rows logits, const int64_t* index, const double* temperatures, const uint64_t* starts,
                 int64_t* winners, int threads);

    // The distribution of the token after each row's contexts, keys [rows, orders] by increasing length and -1 where the text is shorter;
    // lengths[row] = tokens of the longest context that was ever counted.
    void (*counted_prior)(int64_t rows, int64_t vocab, const CountedNgrams& counted, const int64_t* keys, Rows probabilities,
                          int64_t* lengths, int threads);

    // Completes candidates of each row, tokens [rows, count]: the first `certain` and those behind the next `likeliest` are given; these become
    // the tokens that are likeliest of all but the certain ones. probabilities [rows, count] are 0 where a certain token stands for the second
    // time, and where one behind the likeliest is among those before. `frequent` [certain + likeliest]: the tokens with the largest `base`,
    // by falling size.
    void (*counted_candidates)(int64_t rows, int64_t vocab, const CountedNgrams& counted, const int64_t* keys, const int64_t* frequent,
                               int64_t certain, int64_t likeliest, int64_t count, int64_t* tokens, Rows probabilities, int64_t* lengths,
                               int threads);

    // For the last `fresh` places of texts [batch, size], in which numbers [batch, size] tell one text of a row from another: found
    // [batch, fresh, 2], the token that followed the longest repetition within `window` places, the latest of several, and its kind: 0 for
    // none, or 1 + 3 times the place of its length among `lengths` [kinds] + 0 for once in the window, 1 and 2 where the time before another
    // token followed, or the same.
    void (*find_repeats)(int64_t batch, int64_t size, int64_t fresh, const int64_t* texts, const int64_t* numbers, int64_t window,
                         const int64_t* lengths, int64_t kinds, int64_t* found, int threads);

    // The engine's (weights.h). hidden [T, D] after the final norm; experts [mixtures, T, K] may be null.
    void (*decoder_forward)(const Model& model, int64_t layers, const Step& step, float* hidden, int32_t* experts, Workspace& workspace,
                            int threads);
    // MTP module `layer`: hidden [T, D] of the depth before, step.next_ids the tokens that follow each position.
    void (*decoder_draft)(const Model& model, int64_t layer, const Step& step, const float* previous, float* hidden, Workspace& workspace,
                          int threads);
    // y [leading, tokens, rows] = w x for x [tokens, columns]; soft-capped where cap > 0.
    void (*packed_linear)(const Matrix& w, int64_t tokens, const float* x, float cap, float* y, Workspace& workspace, int threads);
};

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }

}  // namespace shoal
