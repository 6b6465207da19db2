// Where a text had its last tokens before, and what followed them (model/repeats.py).
#include "kernels.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {

void find_repeats(int64_t batch, int64_t size, int64_t fresh, const int64_t* texts, const int64_t* numbers, int64_t window,
                  const int64_t* lengths, int64_t kinds, int64_t* found, int threads) {
    const int64_t longest = lengths[kinds - 1];
#pragma omp parallel for schedule(static) num_threads(team(batch * fresh * smaller(size, window), threads))
    for (int64_t item = 0; item < batch * fresh; ++item) {
        const int64_t *text = texts + item / fresh * size, *number = numbers + item / fresh * size;
        const int64_t at = size - fresh + item % fresh;
        int64_t first[kMostRepeatLengths], second[kMostRepeatLengths];  // the latest place with the same tokens, and the one before it
        for (int64_t k = 0; k < kinds; ++k) first[k] = second[k] = -1;
        for (int64_t place = at - 1, end = larger(at - window, 0); place >= end && second[kinds - 1] < 0; --place) {
            if (text[place] != text[at] || number[place] != number[at]) continue;
            int64_t same = 1;
            while (same < longest && same <= place && text[place - same] == text[at - same]) ++same;
            for (int64_t k = 0; k < kinds && lengths[k] <= same; ++k) {
                if (first[k] < 0)
                    first[k] = place;
                else if (second[k] < 0)
                    second[k] = place;
            }
        }
        int64_t k = kinds - 1;
        while (k >= 0 && first[k] < 0) --k;
        found[2 * item] = k < 0 ? 0 : text[first[k] + 1];
        found[2 * item + 1] = 0;
        if (k < 0) continue;
        const int64_t state = second[k] < 0 ? 0 : text[second[k] + 1] == text[first[k] + 1] ? 2 : 1;
        found[2 * item + 1] = 1 + 3 * k + state;
    }
}

}  // namespace shoal::SHOAL_ISA
