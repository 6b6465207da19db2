// Softmax cross-entropy of rows of logits, whose gradient takes their place.
#include <cmath>

#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

// Good to 1e-7 of 1, which is what softcapped logits need; not relative to small results.
static inline Vec tanh(Vec x) { return 1 - 2 / (1 + exp(x + x)); }

void cross_entropy(int64_t rows, int64_t vocab, Rows logits, const int64_t* targets, float softcap, bool with_grad, float* nats,
                   int threads) {
    const int64_t ignored = -100;
#pragma omp parallel num_threads(team(rows * vocab, threads))
    {
        Scratch scratch(vocab);
        float* room = scratch.take(vocab);  // for soft-capped logits where they may not take the place of the raw ones
#pragma omp for schedule(dynamic, 8)
        for (int64_t r = 0; r < rows; ++r) {
            float* row = logits[r];
            if (targets[r] == ignored) {
                nats[r] = 0;
                if (with_grad) memset(row, 0, vocab * sizeof(float));
                continue;
            }
            // Whole registers, then the rest, which is padded with -inf so that it adds nothing.
            const int64_t whole = vocab / kLanes * kLanes;
            Vec rest = splat(-INFINITY);
            for (int64_t c = whole; c < vocab; ++c) rest[c - whole] = row[c];
            if (softcap > 0) {
                float* capped = with_grad ? row : room;
                for (int64_t c = 0; c < whole; c += kLanes) store(capped + c, tanh(load(row + c) / softcap) * softcap);
                row = capped;
                rest = lane_numbers() < int32_t(vocab - whole) ? tanh(rest / softcap) * softcap : rest;
            }
            Vec tops = rest;
            for (int64_t c = 0; c < whole; c += kLanes) tops = max(tops, load(row + c));
            const float top = max(tops);
            const int64_t target = targets[r];
            const float hit = target < whole ? row[target] : rest[target - whole];
            auto slope = [&](Vec logit) {  // of the softcap
                Vec share = logit / softcap;
                return softcap > 0 ? 1 - share * share : splat(1);
            };
            Vec exps = exp(rest - top);
            if (with_grad) store_first(row + whole, exps * slope(rest), vocab - whole);
            for (int64_t c = 0; c < whole; c += kLanes) {
                const Vec logit = load(row + c), power = exp(logit - top);
                exps += power;
                if (with_grad) store(row + c, power * slope(logit));
            }
            const float total = sum(exps);
            nats[r] = top + logf(total) - hit;
            if (!with_grad) continue;
            for (int64_t c = 0; c < whole; c += kLanes) store(row + c, load(row + c) / total);
            for (int64_t c = whole; c < vocab; ++c) row[c] /= total;
            row[target] -= slope(splat(hit))[0];
        }
    }
}

}  // namespace shoal::SHOAL_ISA
