// Sampled softmax: the head and its cross-entropy over a few candidates of every position, whose rows of the head are read where they lie.
#include <cmath>

#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

static float dot(const float* a, const float* b, int64_t width) {
    Vec sums = {};
    for (int64_t d = 0; d < width; d += kLanes) sums += load_first(a + d, width - d) * load_first(b + d, width - d);
    return sum(sums);
}

// y += factor x.
static void add_scaled(float factor, const float* x, float* y, int64_t width) {
    for (int64_t d = 0; d < width; d += kLanes)
        store_first(y + d, load_first(y + d, width - d) + factor * load_first(x + d, width - d), width - d);
}

void sampled_cross_entropy(int64_t rows, int64_t count, int64_t width, Rows hidden, const float* weight, const int64_t* tokens,
                           const float* log_weights, const float* shares, const float* more, float* losses, float* nats, float* grad_logits,
                           Rows grad_hidden, int threads) {
#pragma omp parallel num_threads(team(rows * count, threads))
    {
        Scratch scratch(2 * count + kLanes);
        float* logits = scratch.take(count);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t* row = tokens + r * count;
            const float *log_weight = log_weights + r * count, *share = shares + r * count;
            float* grad = grad_logits + r * count;  // of the weighted logits until their sum is known
            float learnt = 0, top = -INFINITY;
            for (int64_t c = 0; c < count; ++c) {
                logits[c] = dot(hidden[r], weight + row[c] * width, width) + (more ? more[r * count + c] : 0);
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
            memset(grad_hidden[r], 0, width * sizeof(float));
            for (int64_t c = 0; c < count; ++c) {
                grad[c] = grad[c] / total - share[c];
                add_scaled(grad[c], weight + row[c] * width, grad_hidden[r], width);
            }
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
