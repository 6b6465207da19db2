// Distributions of n-grams that were counted: rows of a sorted list of (context, token) entries, mixed from short contexts to long ones.
#include <cmath>

#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

// The first of `entries` that is not less than `value`; `index` holds where every value of the upper bits begins.
static int64_t first_not_less(const CountedNgrams& counted, int64_t value) {
    int64_t low = counted.index[value >> counted.index_shift], high = counted.index[(value >> counted.index_shift) + 1];
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (counted.entries[middle] < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Entries [begin, end) of one context: `total` counts, of which `discounted` go to what shorter contexts say.
struct Row {
    int64_t begin, end;
    float total, discounted;
};

// Where the entries of `key` end that begin at `begin`: most are few, those of frequent tokens thousands.
static int64_t end_of(const CountedNgrams& counted, int64_t begin, int64_t key) {
    const int64_t bits = counted.token_bits;
    int64_t inside = begin, step = 1;
    for (; inside + step <= counted.size && counted.entries[inside + step - 1] >> bits == key; step *= 2) inside += step;
    while (step > 1) {
        step /= 2;
        if (inside + step <= counted.size && counted.entries[inside + step - 1] >> bits == key) inside += step;
    }
    return inside;
}

static Row row_of(const CountedNgrams& counted, int64_t order, int64_t key) {
    const float* discounts = counted.discounts + 4 * order;
    const int64_t begin = first_not_less(counted, key << counted.token_bits), end = end_of(counted, begin, key);
    int32_t total = 0, ones = 0, twos = 0;
    for (int64_t i = begin; i < end; ++i) {
        total += counted.counts[i];
        ones += counted.counts[i] == 1;
        twos += counted.counts[i] == 2;
    }
    return {begin, end, float(total), ones * discounts[1] + twos * discounts[2] + (end - begin - ones - twos) * discounts[3]};
}

// What the contexts of row `r` say: out [vocab]; returns the length of the longest context `found`.
static int64_t distribution(int64_t r, int64_t vocab, const CountedNgrams& counted, const int64_t* keys, float* out, Row* found) {
    const int64_t tokens = (int64_t{1} << counted.token_bits) - 1;
    int64_t length = 0;
    for (; length < counted.orders && keys[r * counted.orders + length] >= 0; ++length) {
        found[length] = row_of(counted, length, keys[r * counted.orders + length]);
        if (found[length].begin == found[length].end) break;  // what never followed is not part of anything longer either
    }
    float rest = 1;  // for contexts shorter than the one at hand
    float shares[kMostOrders];
    for (int64_t n = length; n--;) {
        shares[n] = rest / found[n].total;
        rest *= found[n].discounted / found[n].total;
    }
    for (int64_t v = 0; v < vocab; ++v) out[v] = rest * counted.base[v];
    for (int64_t n = 0; n < length; ++n) {
        const float* discounts = counted.discounts + 4 * n;
        for (int64_t i = found[n].begin; i < found[n].end; ++i) {
            const int16_t count = counted.counts[i];
            out[counted.entries[i] & tokens] += (count - discounts[count < 3 ? count : 3]) * shares[n];
        }
    }
    return length;
}

void counted_prior(int64_t rows, int64_t vocab, const CountedNgrams& counted, const int64_t* keys, Rows probabilities, int64_t* lengths,
                   int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(team(rows * vocab, threads))
    for (int64_t r = 0; r < rows; ++r) {
        Row found[kMostOrders];
        lengths[r] = distribution(r, vocab, counted, keys, probabilities[r], found);
    }
}

// The `size` likeliest tokens that were offered, by falling probability.
struct Likeliest {
    int64_t* tokens;
    float* probabilities;
    int64_t size, held;
    SHOAL_INLINE_MEMBER void offer(int64_t token, float probability) {
        if (size == 0 || (held == size && probability <= probabilities[size - 1])) return;
        int64_t at = held < size ? held++ : size - 1;
        for (; at > 0 && probabilities[at - 1] < probability; --at) {
            probabilities[at] = probabilities[at - 1];
            tokens[at] = tokens[at - 1];
        }
        probabilities[at] = probability;
        tokens[at] = token;
    }
};

void counted_candidates(int64_t rows, int64_t vocab, const CountedNgrams& counted, const int64_t* keys, const int64_t* frequent,
                        int64_t certain, int64_t likeliest, int64_t count, int64_t* tokens, Rows probabilities, int64_t* lengths,
                        int threads) {
    const int64_t bits = (int64_t{1} << counted.token_bits) - 1;
#pragma omp parallel num_threads(team(rows * vocab, threads))
    {
        Scratch scratch(vocab);
        float* said = scratch.take(vocab);
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < rows; ++r) {
            Row found[kMostOrders];
            lengths[r] = distribution(r, vocab, counted, keys, said, found);
            int64_t* row = tokens + r * count;
            float* out = probabilities[r];
            // A token that has been taken is 0 from then on: neither likely nor drawn once more.
            for (int64_t c = 0; c < certain; ++c) {
                out[c] = said[row[c]];
                said[row[c]] = 0;
            }
            Likeliest best = {row + certain, out + certain, likeliest, 0};
            // One that has been offered is negative until the end. The longest contexts know the likeliest, so that few of the many others
            // are taken in.
            auto offer = [&](int64_t token) {
                if (said[token] <= 0) return;
                best.offer(token, said[token]);
                said[token] = -said[token];
            };
            for (int64_t n = lengths[r]; n--;)
                for (int64_t i = found[n].begin; i < found[n].end; ++i) offer(counted.entries[i] & bits);
            // Of all others one that is more frequent is likelier, so that no more than these are among the likeliest.
            for (int64_t i = 0; i < certain + likeliest; ++i) offer(frequent[i]);
            for (int64_t c = 0; c < likeliest; ++c) said[best.tokens[c]] = 0;
            for (int64_t c = certain + likeliest; c < count; ++c) out[c] = fabsf(said[row[c]]);
        }
    }
}

}  // namespace shoal::SHOAL_ISA
