// Operations that read and write each row once: RMSNorm, SwiGLU, RoPE. They are bound by memory; the point is a single pass.
#include <cmath>

#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

static float inverse_rms(const float* x, int64_t width, float eps) {
    Vec squares = {};
    for (int64_t c = 0; c < width; c += kLanes) {
        Vec v = load_first(x + c, width - c);
        squares += v * v;
    }
    return 1 / sqrtf(sum(squares) / width + eps);
}

void rms_norm(int64_t rows, int64_t width, Rows x, const float* weight, float eps, Rows y, int threads) {
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t r = 0; r < rows; ++r) {
        float scale = inverse_rms(x[r], width, eps);
        for (int64_t c = 0; c < width; c += kLanes) {
            Vec v = load_first(x[r] + c, width - c) * scale;
            store_first(y[r] + c, weight ? v * load_first(weight + c, width - c) : v, width - c);
        }
    }
}

// With s = 1 / rms(x) and h = weight * grad: grad_x = s h - s^3 x mean(h x), grad_weight = sum over rows of s x grad.
void rms_norm_backward(int64_t rows, int64_t width, Rows x, const float* weight, float eps, Rows grad, Rows grad_x, float* grad_weight,
                       int threads) {
    const int64_t padded = round_up(width, kLanes), share = blocks_of(threads, rows);
    // Each thread sums the rows of its share; the shares are added in their order.
    Scratch scratch(grad_weight ? threads * padded : 0);
    float* partial = grad_weight ? scratch.take(threads * padded) : nullptr;
    if (partial) memset(partial, 0, threads * padded * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int t = 0; t < threads; ++t)
        for (int64_t r = t * share; r < smaller(rows, (t + 1) * share); ++r) {
            float scale = inverse_rms(x[r], width, eps);
            Vec products = {};
            for (int64_t c = 0; c < width; c += kLanes) {
                Vec h = load_first(grad[r] + c, width - c);
                if (weight) h *= load_first(weight + c, width - c);
                products += h * load_first(x[r] + c, width - c);
            }
            float pull = sum(products) / width * scale * scale;
            for (int64_t c = 0; c < width; c += kLanes) {
                Vec v = load_first(x[r] + c, width - c), g = load_first(grad[r] + c, width - c);
                Vec h = weight ? g * load_first(weight + c, width - c) : g;
                store_first(grad_x[r] + c, (h - v * pull) * scale, width - c);
                if (partial) store(partial + t * padded + c, load(partial + t * padded + c) + g * v * scale);
            }
        }
    for (int64_t c = 0; partial && c < width; c += kLanes) {
        Vec total = {};
        for (int t = 0; t < threads; ++t) total += load(partial + t * padded + c);
        store_first(grad_weight + c, total, width - c);
    }
}

void swiglu(int64_t rows, int64_t width, Rows gate, Rows up, Rows y, int threads) {
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; c += kLanes) {
            Vec g = load_first(gate[r] + c, width - c);
            store_first(y[r] + c, g / (1 + exp(-g)) * load_first(up[r] + c, width - c), width - c);
        }
}

// With s = sigmoid(gate): silu = gate s, and its slope is s (1 + gate (1 - s)).
void swiglu_backward(int64_t rows, int64_t width, Rows gate, Rows up, Rows grad, Rows grad_gate, Rows grad_up, int threads) {
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < width; c += kLanes) {
            Vec g = load_first(gate[r] + c, width - c), h = load_first(grad[r] + c, width - c);
            Vec s = 1 / (1 + exp(-g));
            store_first(grad_gate[r] + c, h * load_first(up[r] + c, width - c) * s * (1 + g * (1 - s)), width - c);
            store_first(grad_up[r] + c, h * g * s, width - c);
        }
}

void rope(RopeShape s, Heads x, const float* cos, const float* sin, float direction, Heads y, int threads) {
    const int64_t half = s.width / 2;
#pragma omp parallel for schedule(static) num_threads(team(s.batch * s.time * s.heads * s.width, threads))
    for (int64_t token = 0; token < s.batch * s.time; ++token) {
        int64_t b = token / s.time, t = token % s.time;
        const float* __restrict c = cos + b * s.table_batch_stride + t * half;
        const float* __restrict d = sin + b * s.table_batch_stride + t * half;
        for (int64_t h = 0; h < s.heads; ++h) {
            const float* __restrict from = x.at(b, t, h);
            float* __restrict to = y.at(b, t, h);
            if (s.interleaved)
                for (int64_t i = 0; i < half; ++i) {
                    float u = from[2 * i], v = from[2 * i + 1], turn = direction * d[i];
                    to[2 * i] = u * c[i] - v * turn;
                    to[2 * i + 1] = v * c[i] + u * turn;
                }
            else
                for (int64_t i = 0; i < half; ++i) {
                    float u = from[i], v = from[i + half], turn = direction * d[i];
                    to[i] = u * c[i] - v * turn;
                    to[i + half] = v * c[i] + u * turn;
                }
        }
    }
}

}  // namespace shoal::SHOAL_ISA
