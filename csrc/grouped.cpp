// Products of rows with one matrix for each group of them, the experts, or with one matrix for all. Each product alone would be too short
// for several threads. A row's result depends neither on the other rows nor on the number of threads.
#include "kernels.h"
#include "matmul.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {
namespace {

constexpr int64_t kMostRows = 128;  // of one group, computed by one thread: much more work than bringing their matrix into order
constexpr int64_t kPacked = 1 << 15;  // numbers of a matrix that are brought into order at a time, and stay in the cache
constexpr int64_t kMostOuterRows = 64;  // of a sum of outer products
constexpr int64_t kDepth = 256;     // rows whose outer products are summed up before the next ones come into the cache
constexpr int64_t kItems = 3;       // for every thread, if there is so much work

// Rows of one item of work: so many that every thread has some items, but at most `most`.
int64_t rows_of_item(int64_t rows, int64_t most, int threads) {
    return larger(kTileRows, smaller(most, round_up(rows / (kItems * threads), kTileRows)));
}

auto write_first(Rows to, int64_t width) {
    return [=](int64_t row, int64_t column, Vec acc) { store_first(to[row] + column, acc, width - column); };
}
auto add_first(Rows to, int64_t width) {
    return [=](int64_t row, int64_t column, Vec acc) {
        float* p = to[row] + column;
        store_first(p, load_first(p, width - column) + acc, width - column);
    };
}

}  // namespace

void grouped_product(int64_t groups, const int32_t* ends, int64_t depth, int64_t width, Rows x, const float* weight, bool transposed, Rows y,
                     int threads) {
    // Columns behind the last one are computed and dropped.
    const int64_t panels = blocks_of(kPanel, width), taken = larger(1, smaller(panels, kPacked / (kPanel * depth)));
    const int64_t part_width = taken * kPanel, parts = blocks_of(taken, panels), item_rows = rows_of_item(ends[groups - 1], kMostRows, threads);
    int64_t items = 0;
    for (int64_t g = 0, begin = 0; g < groups; begin = ends[g++]) items += parts * blocks_of(item_rows, ends[g] - begin);
#pragma omp parallel num_threads(team(ends[groups - 1] * depth * width / kLanes, threads))
    {
        Scratch scratch(depth * part_width);
        float* packed = scratch.take(depth * part_width);
        int64_t held = -1, group = 0, begin = 0, before = 0;  // of the group in turn: its first row, and the items before it
#pragma omp for schedule(monotonic : dynamic)
        for (int64_t item = 0; item < items; ++item) {
            for (int64_t own; item >= before + (own = parts * blocks_of(item_rows, ends[group] - begin)); begin = ends[group++]) before += own;
            const int64_t blocks = blocks_of(item_rows, ends[group] - begin), part = (item - before) / blocks, column = part * part_width;
            const int64_t count = smaller(part_width, width - column), stride = round_up(count, kLanes);
            const float* matrix = weight + group * depth * width;
            if (held != group * parts + part) {
                if (transposed)
                    transpose(matrix + column * depth, depth, count, depth, packed, stride);
                else
                    for (int64_t k = 0; k < depth; ++k) memcpy(packed + k * stride, matrix + k * width + column, count * 4);
                held = group * parts + part;
            }
            const int64_t first = begin + (item - before) % blocks * item_rows;
            multiply(smaller(item_rows, ends[group] - first), stride, x[first], x.stride, 1, packed, stride, [&](int64_t) { return Range{0, depth}; },
                     write_first({y[first] + column, y.stride}, count));
        }
    }
}

void grouped_outer(int64_t groups, const int32_t* ends, int64_t height, int64_t width, Rows grad, Rows x, float* y, bool add,
                   int threads) {
    const int64_t stride = round_up(width, kLanes), item_rows = rows_of_item(groups * height, kMostOuterRows, threads);
    const int64_t parts = blocks_of(item_rows, height);
    const bool packs = stride != width;
#pragma omp parallel num_threads(team(ends[groups - 1] * height * width / kLanes, threads))
    {
        Scratch scratch(packs ? kDepth * stride : 0);
        float* packed = scratch.take(packs ? kDepth * stride : 0);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < groups * parts; ++item) {
            const int64_t group = item / parts, top = item % parts * item_rows, rows = smaller(item_rows, height - top);
            const int64_t begin = group ? ends[group - 1] : 0, end = ends[group];
            const Rows to = {y + (group * height + top) * width, width};
            if (begin == end && !add) memset(to.data, 0, rows * width * 4);
            for (int64_t first = begin; first < end; first += kDepth) {
                const int64_t depth = smaller(kDepth, end - first);
                for (int64_t k = 0; packs && k < depth; ++k) memcpy(packed + k * stride, x[first + k], width * 4);
                const Rows from = packs ? Rows{packed, stride} : Rows{x[first], x.stride};
                auto sum_up = [&](auto done) {
                    multiply(rows, stride, grad[first] + top, 1, grad.stride, from.data, from.stride, [&](int64_t) { return Range{0, depth}; }, done);
                };
                if (first == begin && !add)
                    sum_up(write_first(to, width));
                else
                    sum_up(add_first(to, width));
            }
        }
    }
}

}  // namespace shoal::SHOAL_ISA
