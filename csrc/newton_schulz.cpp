// Newton-Schulz orthogonalisation, as Muon uses it (Jordan et al., 2024). Each matrix is iterated by one thread, in its own cache.
//
// A matrix X is held as Y [tall, narrow]: itself, or its transpose where it is wide. One step is Y <- Y Q with Q = a I + b G + c G G and
// G = Y^T Y. G and every polynomial of it are symmetric, so that only their blocks on and above the diagonal are computed. They also
// commute: the G after a step is Q G Q. So several steps can be taken on narrow x narrow matrices alone; one product then brings Y in.
#include <cmath>

#include "kernels.h"
#include "matmul.h"
#include "vector.h"

namespace shoal::SHOAL_ISA {
namespace {

// Steps between two computations of G from Y. Rounding moves the eigenvalues of G by about 1e-7, below 0 where Y is close to singular, and
// a step multiplies small ones by a^2 = 12. Three keep the accuracy of steps on Y; five cost singular values of 1e-3 their third digit.
constexpr int64_t kStepsOnGram = 3;

struct Layout {
    bool wide;
    int64_t tall, narrow;
    int64_t width;           // narrow in whole registers; the columns beyond it are 0
    int64_t stride;          // an odd number of cache lines: with a power of two, a column would lie in few sets of the cache
    int64_t oblong, square;  // floats of a [tall, narrow] and of a [narrow, narrow] matrix
    Layout(int64_t rows, int64_t columns)
        : wide(rows < columns), tall(larger(rows, columns)), narrow(smaller(rows, columns)), width(round_up(narrow, kLanes)),
          stride((blocks_of(16, narrow) | 1) * 16), oblong(tall * stride), square(width * stride) {}
};

// The symmetric A B [narrow, narrow]: done(row, column, acc) gets its registers on and above the diagonal and stores them in `to`, whose
// lower half is then copied from the upper one.
template <class Done>
void multiply_symmetric(const Layout& l, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b, float* to,
                        Done done) {
    for (int64_t column = 0; column < l.width; column += kPanel) {
        const int64_t end = smaller(column + kPanel, l.width);
        for (int64_t r = 0; r < smaller(end, l.narrow); r += kTileRows) {
            const int64_t first = larger(column, r / kLanes * kLanes);
            tile_up_to<kTileRows, kTileVectors>((end - first) / kLanes, l.narrow - r, depth, a + r * a_row, a_row, a_column, b + first,
                                                l.stride, [&](int i, int j, Vec acc) { done(r + i, first + j * kLanes, acc); });
        }
    }
    for (int64_t r = 0; r < l.narrow; r += 4) {
        for (int64_t i = r; i < r + 4; ++i)
            for (int64_t j = r; j < i; ++j) to[i * l.stride + j] = to[j * l.stride + i];
        for (int64_t c = r + 4; c < l.width; c += 4) transpose_4x4(to + r * l.stride + c, l.stride, to + c * l.stride + r, l.stride);
    }
}

// The working memory of one thread, and the steps on what it holds.
class Iteration {
  public:
    Iteration(const Layout& layout, float a, float b, float c)
        : l_(layout), a_(a), b_(b), c_(c), scratch_(2 * l_.oblong + 4 * l_.square), y_(scratch_.take(l_.oblong)),
          next_y_(scratch_.take(l_.oblong)), gram_(scratch_.take(l_.square)), step_(scratch_.take(l_.square)),
          product_(scratch_.take(l_.square)), spare_(scratch_.take(l_.square)) {}

    void load_normalised(const float* x) {
        memset(y_, 0, l_.oblong * sizeof(float));
        if (l_.wide)
            transpose(x, l_.tall, l_.narrow, l_.tall, y_, l_.stride);
        else
            for (int64_t r = 0; r < l_.tall; ++r) memcpy(y_ + r * l_.stride, x + r * l_.narrow, l_.narrow * sizeof(float));
        Vec squares = {};
        for (int64_t i = 0; i < l_.oblong; i += kLanes) squares += load(y_ + i) * load(y_ + i);
        const float scale = 1 / (sqrtf(sum(squares)) + 1e-7f);
        for (int64_t i = 0; i < l_.oblong; i += kLanes) store(y_ + i, load(y_ + i) * scale);
    }

    void take_steps(int64_t steps) {
        multiply_symmetric(l_, l_.tall, y_, 1, l_.stride, y_, gram_, write_to(gram_, l_.stride));
        polynomial(product_);
        const float* last = product_;
        for (int64_t taken = 1; taken < steps; ++taken) {
            times(gram_, last, spare_);
            times(spare_, last, gram_);
            polynomial(step_);
            times(product_, step_, spare_);
            swap(product_, spare_);
            last = step_;
        }
        multiply(l_.tall, l_.width, y_, l_.stride, 1, product_, l_.stride, [&](int64_t) { return Range{0, l_.narrow}; },
                 write_to(next_y_, l_.stride));
        swap(y_, next_y_);
    }

    void store_to(float* x) const {
        if (l_.wide)
            transpose(y_, l_.stride, l_.tall, l_.narrow, x, l_.tall);
        else
            for (int64_t r = 0; r < l_.tall; ++r) memcpy(x + r * l_.narrow, y_ + r * l_.stride, l_.narrow * sizeof(float));
    }

  private:
    const Layout l_;
    const float a_, b_, c_;
    Scratch scratch_;
    float *y_, *next_y_;                       // [tall, stride]
    float *gram_, *step_, *product_, *spare_;  // [width, stride]; product_ is that of the steps since gram_ was computed from y_

    static void swap(float*& a, float*& b) {
        float* old = a;
        a = b, b = old;
    }
    // Of two polynomials of gram_.
    void times(const float* left, const float* right, float* to) const {
        multiply_symmetric(l_, l_.narrow, left, l_.stride, 1, right, to, write_to(to, l_.stride));
    }
    // to = a I + b G + c G G.
    void polynomial(float* to) const {
        multiply_symmetric(l_, l_.narrow, gram_, l_.stride, 1, gram_, to, [&](int64_t row, int64_t column, Vec acc) {
            store(to + row * l_.stride + column, b_ * load(gram_ + row * l_.stride + column) + c_ * acc);
        });
        for (int64_t i = 0; i < l_.narrow; ++i) to[i * l_.stride + i] += a_;
    }
};

}  // namespace

void newton_schulz(int64_t batch, int64_t rows, int64_t columns, const float* x, NewtonSchulz settings, float* y, int threads) {
    const Layout layout(rows, columns);
    // Steps on the Gram matrix save arithmetic unless X is nearly square.
    const int64_t together = 4 * layout.tall >= 5 * layout.narrow ? kStepsOnGram : 1;
#pragma omp parallel num_threads(smaller(threads, batch))
    {
        Iteration iteration(layout, settings.a, settings.b, settings.c);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < batch; ++item) {
            iteration.load_normalised(x + item * rows * columns);
            for (int64_t left = settings.steps; left > 0; left -= together) iteration.take_steps(smaller(left, together));
            iteration.store_to(y + item * rows * columns);
        }
    }
}

}  // namespace shoal::SHOAL_ISA
