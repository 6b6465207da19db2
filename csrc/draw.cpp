// A token of every row of logits, drawn by a race of exponential times: token i arrives at E_i / w_i with w_i = exp(logit_i / T), so that it
// wins with probability w_i / sum of w; at temperature 0 the likeliest token wins. E_i depends on the row's `start` and on i alone. The
// specification is draw() in src/shoal/engine/race.py; what is done here is to compute only the few times that can win.
#include <math.h>

#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

typedef uint64_t Counters __attribute__((vector_size(8 * SHOAL_LANES)));

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr float kNever = 28;     // tokens so many nats below the best are not drawn
constexpr float kSlack = 1.001;  // more than the error of the estimates below
constexpr int64_t kBlock = 8 * kLanes;

// SplitMix64's mixing function, on a number or on a register of them.
template <class T>
SHOAL_INLINE T mixed(T x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

// Takes tokens one by one and keeps the one that arrives first.
struct Race {
    const float* logits;
    float top;
    double temperature;
    uint64_t start;
    int64_t winner = -1;
    double best = -1;  // w / E of the winner

    SHOAL_INLINE_MEMBER void enter(int64_t i) {
        if (logits[i] < top - float(kNever * temperature)) return;
        const double uniform = (double(mixed(start + uint64_t(i) * kGolden) >> 12) + 0.5) * 0x1p-52;
        const double speed = ::exp((double(logits[i]) - double(top)) / temperature) / -::log(uniform);
        if (speed > best || (speed == best && i < winner)) best = speed, winner = i;
    }
};

// Where `value`, which is there, stands first.
static int64_t first_of(const float* logits, int64_t vocab, float value) {
    int64_t c = 0;
    for (; c + kBlock <= vocab; c += kBlock) {
        IntVec found = {};
        for (int64_t i = 0; i < kBlock; i += kLanes) found |= load(logits + c + i) == value;
        bool any = false;
        for (int lane = 0; lane < kLanes; ++lane) any |= found[lane] != 0;
        if (any) break;
    }
    while (logits[c] != value) ++c;
    return c;
}

static int64_t winner_of(const float* logits, int64_t vocab, double temperature, uint64_t start) {
    const int64_t whole = vocab / kBlock * kBlock;
    Vec tops = splat(-INFINITY);
    IntVec numbers = lane_numbers() == lane_numbers();  // where all logits are numbers
    for (int64_t c = 0; c < whole; c += kLanes) {
        const Vec x = load(logits + c);
        tops = max(tops, x);
        numbers &= x == x;
    }
    float top = max(tops);
    bool all_numbers = true;
    for (int lane = 0; lane < kLanes; ++lane) all_numbers &= numbers[lane] != 0;
    for (int64_t c = whole; c < vocab; ++c) {
        all_numbers &= logits[c] == logits[c];
        top = logits[c] > top ? logits[c] : top;
    }
    if (!all_numbers || top == INFINITY || top == -INFINITY) return -1;

    const int64_t likely = first_of(logits, vocab, top);
    if (temperature == 0) return likely;
    Race race = {logits, top, temperature, start};
    race.enter(likely);  // it comes in early: few others have to be looked at
    for (int64_t c = whole; c < vocab; ++c) race.enter(c);
    Counters counters;
    for (int lane = 0; lane < kLanes; ++lane) counters[lane] = start + uint64_t(lane) * kGolden;
    for (int64_t block = 0; block < whole; block += kBlock) {
        // E = -log(u) >= 1 - u: a token whose w / (1 - u) is no larger than the best w / E cannot win.
        const float best = float(race.best);
        Vec lead = splat(-1);
        for (int64_t c = block; c < block + kBlock; c += kLanes) {
            const Vec weight = exp((load(logits + c) - top) / float(temperature));
            const Vec rest = __builtin_convertvector(~mixed(counters) >> 12, Vec);  // (1 - u) 2^52
            lead = max(lead, weight * kSlack - rest * (0x1p-52f * best));
            counters += uint64_t(kLanes) * kGolden;
        }
        if (max(lead) >= 0)
            for (int64_t c = block; c < block + kBlock; ++c) race.enter(c);
    }
    return race.winner;
}

void draw(int64_t rows, int64_t vocab, Rows logits, const int64_t* index, const double* temperatures, const uint64_t* starts,
          int64_t* winners, int threads) {
    // A float takes a nanosecond: others help only where there are millions.
#pragma omp parallel for schedule(dynamic) num_threads(team(rows * vocab / 64, threads))
    for (int64_t r = 0; r < rows; ++r) winners[r] = winner_of(logits[index[r]], vocab, temperatures[r], starts[r]);
}

}  // namespace shoal::SHOAL_ISA
