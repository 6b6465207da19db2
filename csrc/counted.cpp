// Distributions of n-grams that were counted: rows of a sorted list of (context, token) entries, mixed from short contexts to long ones.
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

static Row row_of(const CountedNgrams& counted, int64_t order, int64_t key) {
    const int64_t bits = counted.token_bits;
    const float* discounts = counted.discounts + 4 * order;
    Row row = {first_not_less(counted, key << bits), 0, 0, 0};
    row.end = row.begin;
    for (; row.end < counted.size && counted.entries[row.end] >> bits == key; ++row.end) {
        const int16_t count = counted.counts[row.end];
        row.total += count;
        row.discounted += discounts[count < 3 ? count : 3];
    }
    return row;
}

// What the contexts of row `r` say: out [vocab]; returns the length of the longest context found, `first` its entries of the shortest.
static int64_t distribution(int64_t r, int64_t vocab, const CountedNgrams& counted, const int64_t* keys, float* out, Row* first) {
    const int64_t tokens = (int64_t{1} << counted.token_bits) - 1;
    Row found[kMostOrders];
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
    *first = length ? found[0] : Row{0, 0, 0, 0};
    return length;
}

void counted_prior(int64_t rows, int64_t vocab, const CountedNgrams& counted, const int64_t* keys, Rows probabilities, int64_t* lengths,
                   int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(team(rows * vocab, threads))
    for (int64_t r = 0; r < rows; ++r) {
        Row first;
        lengths[r] = distribution(r, vocab, counted, keys, probabilities[r], &first);
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
            Row first;
            lengths[r] = distribution(r, vocab, counted, keys, said, &first);
            int64_t* row = tokens + r * count;
            float* out = probabilities[r];
            // A token that has been taken is 0 from then on: neither likely nor drawn once more.
            for (int64_t c = 0; c < certain; ++c) {
                out[c] = said[row[c]];
                said[row[c]] = 0;
            }
            Likeliest best = {row + certain, out + certain, likeliest, 0};
            for (int64_t i = first.begin; i < first.end; ++i) best.offer(counted.entries[i] & bits, said[counted.entries[i] & bits]);
            // Of all others one that is more frequent is likelier, so that no more than these are among the likeliest.
            for (int64_t i = 0; i < certain + likeliest; ++i) {
                bool counted_here = false;
                for (int64_t c = 0; c < best.held; ++c) counted_here |= best.tokens[c] == frequent[i];
                if (!counted_here) best.offer(frequent[i], said[frequent[i]]);
            }
            for (int64_t c = 0; c < likeliest; ++c) said[best.tokens[c]] = 0;
            for (int64_t c = certain + likeliest; c < count; ++c) out[c] = said[row[c]];
        }
    }
}

}  // namespace shoal::SHOAL_ISA
