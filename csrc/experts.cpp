// Bringing the rows of the experts back to their tokens. (The way there is a gather, at which torch is as fast.)
// Every output row is written by one thread, in a fixed order of its K terms.
#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

void combine(int64_t tokens, int64_t per_token, int64_t width, Rows x, const float* weights, const int64_t* index, Rows y, int threads) {
#pragma omp parallel for schedule(static) num_threads(team(tokens * per_token * width, threads))
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t c = 0; c < width; c += kLanes) {
            Vec total = {};
            for (int64_t slot = n * per_token; slot < (n + 1) * per_token; ++slot) {
                Vec v = load_first(x[index[slot]] + c, width - c);
                total += weights ? v * weights[slot] : v;
            }
            store_first(y[n] + c, total, width - c);
        }
}

void combine_backward(int64_t tokens, int64_t per_token, int64_t width, Rows x, const float* weights, const int64_t* index, Rows grad,
                      Rows grad_x, float* grad_weights, int threads) {
#pragma omp parallel for schedule(static) num_threads(team(tokens * per_token * width, threads))
    for (int64_t n = 0; n < tokens; ++n)
        for (int64_t slot = n * per_token; slot < (n + 1) * per_token; ++slot) {
            Vec products = {};
            for (int64_t c = 0; c < width; c += kLanes) {
                Vec g = load_first(grad[n] + c, width - c);
                products += g * load_first(x[index[slot]] + c, width - c);
                store_first(grad_x[index[slot]] + c, g * weights[slot], width - c);
            }
            grad_weights[slot] = sum(products);
        }
}

}  // namespace shoal::SHOAL_ISA
