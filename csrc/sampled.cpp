// Sampled softmax: the head and its cross-entropy over a few candidates of every position, whose rows of the head are read where they lie.
#include <cmath>

#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

// x . y but for the last step: the sum of the lanes.
static Vec lanes_of_product(const float* x, const float* y, int64_t width) {
    Vec sums = {};
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) sums += load(x + d) * load(y + d);
    if (whole < width) sums += load_first(x + whole, width - whole) * load_first(y + whole, width - whole);
    return sums;
}

// out[c] = x . row tokens[c] of weight. The lanes of kLanes products are summed together, after a transposition.
static void products(const float* x, const float* weight, const int64_t* tokens, int64_t count, int64_t width, float* out) {
    float lanes[kLanes * kLanes], turned[kLanes * kLanes];
    for (int64_t first = 0; first < count; first += kLanes) {
        const int64_t some = smaller(kLanes, count - first);
        for (int64_t c = 0; c < some; ++c) store(lanes + c * kLanes, lanes_of_product(x, weight + tokens[first + c] * width, width));
        transpose(lanes, kLanes, kLanes, kLanes, turned, kLanes);
        Vec sums = {};
        for (int64_t i = 0; i < kLanes; ++i) sums += load(turned + i * kLanes);
        store_first(out + first, sums, some);
    }
}

// y += factor x.
static void add_scaled(float factor, const float* x, float* y, int64_t width) {
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) store(y + d, load(y + d) + factor * load(x + d));
    const int64_t rest = width - whole;
    if (rest) store_first(y + whole, load_first(y + whole, rest) + factor * load_first(x + whole, rest), rest);
}

// y = sum over c of factors[c] times row tokens[c] of weight, four registers at a time.
static void weighted_sum(const float* factors, const float* weight, const int64_t* tokens, int64_t count, int64_t width, float* y) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
        Vec a = {}, b = {}, e = {}, f = {};
        for (int64_t c = 0; c < count; ++c) {
            const float *row = weight + tokens[c] * width + d, factor = factors[c];
            a += factor * load(row), b += factor * load(row + kLanes);
            e += factor * load(row + 2 * kLanes), f += factor * load(row + 3 * kLanes);
        }
        store(y + d, a), store(y + d + kLanes, b), store(y + d + 2 * kLanes, e), store(y + d + 3 * kLanes, f);
    }
    for (; d < width; d += kLanes) {
        Vec sums = {};
        for (int64_t c = 0; c < count; ++c) sums += factors[c] * load_first(weight + tokens[c] * width + d, width - d);
        store_first(y + d, sums, width - d);
    }
}

void sampled_cross_entropy(int64_t rows, int64_t count, int64_t width, Rows hidden, const float* weight, const int64_t* tokens,
                           const float* log_weights, const float* shares, const float* more, float* losses, float* nats, float* grad_logits,
                           Rows grad_hidden, int threads) {
#pragma omp parallel num_threads(team(rows * count, threads))
    {
        Scratch scratch(count);
        float* logits = scratch.take(count);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t* row = tokens + r * count;
            const float *log_weight = log_weights + r * count, *share = shares + r * count;
            float* grad = grad_logits + r * count;  // of the weighted logits until their sum is known
            float learnt = 0, top = -INFINITY;
            products(hidden[r], weight, row, count, width, logits);
            for (int64_t c = 0; c < count; ++c) {
                if (more) logits[c] += more[r * count + c];
                learnt += share[c] * logits[c];
                grad[c] = logits[c] + log_weight[c];
                top = grad[c] > top ? grad[c] : top;
            }
            Vec sums = {};
            for (int64_t c = 0; c < count; c += kLanes) {
                Vec power = exp(load_first(grad + c, count - c) - top);
                store_first(grad + c, power, count - c);
                sums += load_first(grad + c, count - c);  // once more, for the zeros behind the last
            }
            const float total = sum(sums), log_sum = top + logf(total);
            losses[r] = log_sum - learnt;
            nats[r] = log_sum - logits[0];
            for (int64_t c = 0; c < count; ++c) grad[c] = grad[c] / total - share[c];
            weighted_sum(grad, weight, row, count, width, grad_hidden[r]);
        }
    }
}

void add_to_rows(int64_t rows, int64_t count, int64_t width, const float* factors, const int64_t* tokens, Rows x, int64_t vocab, float* y,
                 int threads) {
    const int parts = team(rows * count * width, threads);
    // Each thread has rows of y of its own, and adds in the order of x: the sums do not depend on the number of threads.
#pragma omp parallel for schedule(static) num_threads(parts)
    for (int part = 0; part < parts; ++part) {
        const int64_t begin = vocab * part / parts, end = vocab * (part + 1) / parts;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = r * count; i < (r + 1) * count; ++i)
                if (begin <= tokens[i] && tokens[i] < end) add_scaled(factors[i], x[r], y + tokens[i] * width, width);
    }
}

}  // namespace shoal::SHOAL_ISA
