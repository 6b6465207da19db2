// shoal.kernels._cpu: the kernels as Python methods. Each checks types and shapes, so that no caller can read outside a tensor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "module.h"
#include "tensor.h"

namespace nb = nanobind;
using namespace shoal;
using std::optional;

namespace {

struct Variant {
    const char* name;
    bool runs_here;
    const Kernels* kernels;
};

// Best first.
std::vector<Variant> all_variants() {
#ifdef SHOAL_X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512bw");
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return {{"avx512vnni", vnni, &avx512vnni::kernels},
            {"avx512", avx512, &avx512::kernels},
            {"avx2", avx2, &avx2::kernels},
            {"portable", true, &portable::kernels}};
#else
    return {{"portable", true, &portable::kernels}};
#endif
}

std::vector<std::string> supported() {
    std::vector<std::string> names;
    for (const Variant& variant : all_variants())
        if (variant.runs_here) names.push_back(variant.name);
    return names;
}

void expect(bool holds) {
    if (!holds) throw nb::value_error("the shapes of the tensors do not fit together");
}

void expect_equal(const Tensor& a, const Tensor& b, int dimensions) {
    for (int i = 0; i < dimensions; ++i) expect(a.size(i) == b.size(i));
}

float* vector_of(const optional<Tensor>& vector, int64_t size) {
    if (!vector) return nullptr;
    float* data = vector->flat_floats();
    expect(vector->numel() == size);
    return data;
}

// Where the rows of each group end: int32, rising to the number of rows.
const int32_t* ends_of(const Tensor& ends, int64_t groups, int64_t rows) {
    const int32_t* data = ends.flat_ints();
    expect(ends.numel() == groups && groups > 0 && data[groups - 1] == rows);
    for (int64_t g = 0; g < groups; ++g) expect(data[g] >= (g ? data[g - 1] : 0));
    return data;
}

AttentionShape attention_shape(const Tensor& q, const Tensor& k, const Tensor& v, float scale) {
    q.heads(), k.heads(), v.heads();  // four dimensions each
    AttentionShape shape{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3), scale};
    expect_equal(k, v, 3);
    expect(k.size(0) == shape.batch && k.size(1) == shape.time && k.size(3) == shape.qk_width);
    expect(shape.batch > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 && shape.time < (1 << 30));
    return shape;
}

// The kernels of one instruction set. Methods write into tensors that the caller made, on `threads` threads.
class Cpu {
  public:
    explicit Cpu(const std::string& name) : run_(kernels_named(name)) {}

    void rms_norm(Tensor x, optional<Tensor> weight, float eps, Tensor y, int threads) {
        Rows rows = x.rows(), out = y.rows();
        expect_equal(x, y, 2);
        const float* scale = vector_of(weight, x.size(1));
        Computing computing(threads);
        run_->rms_norm(x.size(0), x.size(1), rows, scale, eps, out, threads);
    }

    void rms_norm_backward(Tensor x, optional<Tensor> weight, float eps, Tensor grad, Tensor grad_x, optional<Tensor> grad_weight,
                           int threads) {
        Rows rows = x.rows(), grad_rows = grad.rows(), out = grad_x.rows();
        expect_equal(x, grad, 2), expect_equal(x, grad_x, 2);
        const float* scale = vector_of(weight, x.size(1));
        float* grad_scale = vector_of(grad_weight, x.size(1));
        Computing computing(threads);
        run_->rms_norm_backward(x.size(0), x.size(1), rows, scale, eps, grad_rows, out, grad_scale, threads);
    }

    void swiglu(Tensor gate, Tensor up, Tensor y, int threads) {
        Rows gates = gate.rows(), ups = up.rows(), out = y.rows();
        expect_equal(gate, up, 2), expect_equal(gate, y, 2);
        Computing computing(threads);
        run_->swiglu(gate.size(0), gate.size(1), gates, ups, out, threads);
    }

    void swiglu_backward(Tensor gate, Tensor up, Tensor grad, Tensor grad_gate, Tensor grad_up, int threads) {
        Rows gates = gate.rows(), ups = up.rows(), grads = grad.rows(), out_gate = grad_gate.rows(), out_up = grad_up.rows();
        expect_equal(gate, up, 2), expect_equal(gate, grad, 2), expect_equal(gate, grad_gate, 2), expect_equal(gate, grad_up, 2);
        Computing computing(threads);
        run_->swiglu_backward(gate.size(0), gate.size(1), gates, ups, grads, out_gate, out_up, threads);
    }

    void rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, float direction, Tensor y, int threads) {
        Heads from = x.heads(), to = y.heads();
        const int64_t batch = x.size(0), time = x.size(1), width = x.size(3);
        const float *c = cos.flat_floats(), *s = sin.flat_floats();
        expect_equal(x, y, 4);
        expect(width % 2 == 0 && cos.numel() == sin.numel());
        const bool shared = cos.numel() == time * width / 2;
        expect(shared || cos.numel() == batch * time * width / 2);
        Computing computing(threads);
        run_->rope({batch, time, x.size(2), width, shared ? 0 : time * width / 2, interleaved}, from, c, s, direction, to, threads);
    }

    void attention(Tensor q, Tensor k, Tensor v, float scale, Tensor y, Tensor log_sum, int threads) {
        AttentionShape shape = attention_shape(q, k, v, scale);
        Heads queries = q.heads(), keys = k.heads(), values = v.heads(), out = y.heads();
        float* sums = log_sum.flat_floats();
        expect_equal(q, y, 3);
        expect(y.size(3) == shape.v_width && log_sum.numel() == shape.batch * shape.heads * shape.time);
        Computing computing(threads);
        run_->attention(shape, queries, keys, values, out, sums, threads);
    }

    void attention_backward(Tensor q, Tensor k, Tensor v, float scale, Tensor y, Tensor log_sum, Tensor grad, Tensor grad_q, Tensor grad_k,
                            Tensor grad_v, int threads) {
        AttentionShape shape = attention_shape(q, k, v, scale);
        Heads queries = q.heads(), keys = k.heads(), values = v.heads(), out = y.heads(), grads = grad.heads();
        Heads out_q = grad_q.heads(), out_k = grad_k.heads(), out_v = grad_v.heads();
        const float* sums = log_sum.flat_floats();
        expect_equal(q, y, 3), expect_equal(y, grad, 4), expect_equal(q, grad_q, 4), expect_equal(k, grad_k, 4), expect_equal(v, grad_v, 4);
        expect(y.size(3) == shape.v_width && log_sum.numel() == shape.batch * shape.heads * shape.time);
        Computing computing(threads);
        run_->attention_backward(shape, queries, keys, values, out, sums, grads, out_q, out_k, out_v, threads);
    }

    void cross_entropy(Tensor logits, Tensor targets, optional<float> softcap, bool with_grad, Tensor nats, int threads) {
        const int64_t ignored = -100, rows = logits.size(0);
        Rows in_place = logits.rows();
        const int64_t* index = targets.indices(logits.size(1), ignored);
        float* out = nats.flat_floats();
        expect(targets.numel() == rows && nats.numel() == rows);
        Computing computing(threads);
        run_->cross_entropy(rows, logits.size(1), in_place, index, softcap.value_or(0), with_grad, out, threads);
    }

    void sampled_cross_entropy(Tensor hidden, Tensor weight, Tensor tokens, Tensor log_weights, Tensor shares, optional<Tensor> more,
                               Tensor losses, Tensor nats, Tensor grad_logits, Tensor grad_hidden, int threads) {
        const int64_t rows = tokens.size(0), count = tokens.size(1), width = weight.size(1);
        Rows from = hidden.rows(), to = grad_hidden.rows();
        const int64_t* index = tokens.indices(weight.size(0));
        const float* extra = vector_of(more, rows * count);
        const float *matrix = weight.flat_floats(), *sampling = log_weights.flat_floats(), *learnt = shares.flat_floats();
        float *out = losses.flat_floats(), *plain = nats.flat_floats(), *grads = grad_logits.flat_floats();
        expect(hidden.size(0) == rows && hidden.size(1) == width && grad_hidden.size(0) == rows && grad_hidden.size(1) == width);
        expect(log_weights.numel() == rows * count && shares.numel() == rows * count && grad_logits.numel() == rows * count);
        expect(losses.numel() == rows && nats.numel() == rows && count > 0);
        Computing computing(threads);
        run_->sampled_cross_entropy(rows, count, width, from, matrix, index, sampling, learnt, extra, out, plain, grads, to, threads);
    }

    void add_to_rows(Tensor factors, Tensor tokens, Tensor x, Tensor y, int threads) {
        const int64_t rows = tokens.size(0), count = tokens.size(1), width = x.size(1);
        Rows from = x.rows();
        const int64_t* index = tokens.indices(y.size(0));
        const float* scale = factors.flat_floats();
        float* to = y.flat_floats();
        expect(x.size(0) == rows && y.size(1) == width && factors.numel() == rows * count);
        Computing computing(threads);
        run_->add_to_rows(rows, count, width, scale, index, from, y.size(0), to, threads);
    }

    void combine(Tensor x, optional<Tensor> weights, Tensor index, Tensor y, int threads) {
        Rows from = x.rows(), to = y.rows();
        const int64_t* rows = index.indices(x.size(0));
        const int64_t tokens = y.size(0), per_token = tokens ? index.numel() / tokens : 0;
        const float* factors = vector_of(weights, index.numel());
        expect(y.size(1) == x.size(1) && index.numel() == tokens * per_token);
        Computing computing(threads);
        run_->combine(tokens, per_token, y.size(1), from, factors, rows, to, threads);
    }

    void combine_backward(Tensor x, Tensor weights, Tensor index, Tensor grad, Tensor grad_x, Tensor grad_weights, int threads) {
        Rows from = x.rows(), grads = grad.rows(), to = grad_x.rows();
        const int64_t* rows = index.indices(x.size(0));
        const int64_t tokens = grad.size(0), per_token = tokens ? index.numel() / tokens : 0;
        const float* factors = vector_of(weights, index.numel());
        float* grad_factors = vector_of(grad_weights, index.numel());
        expect_equal(x, grad_x, 2);
        expect(grad.size(1) == x.size(1) && index.numel() == tokens * per_token);
        Computing computing(threads);
        run_->combine_backward(tokens, per_token, x.size(1), from, factors, rows, grads, to, grad_factors, threads);
    }

    // x [R, depth], weight [G, width, depth] if `transposed` or else [G, depth, width], ends [G] -> y [R, width].
    void grouped_product(Tensor x, Tensor weight, Tensor ends, bool transposed, Tensor y, int threads) {
        Rows from = x.rows(), to = y.rows();
        const float* matrices = weight.flat_floats();
        const int64_t groups = weight.size(0), depth = x.size(1), width = y.size(1);
        expect(y.size(0) == x.size(0) && weight.size(transposed ? 2 : 1) == depth && weight.size(transposed ? 1 : 2) == width);
        const int32_t* bounds = ends_of(ends, groups, x.size(0));
        Computing computing(threads);
        run_->grouped_product(groups, bounds, depth, width, from, matrices, transposed, to, threads);
    }

    // grad [R, height], x [R, width], ends [G] -> y [G, height, width].
    void grouped_outer(Tensor grad, Tensor x, Tensor ends, Tensor y, bool add, int threads) {
        Rows grads = grad.rows(), from = x.rows();
        float* to = y.flat_floats();
        const int64_t groups = y.size(0), height = y.size(1), width = y.size(2);
        expect(grad.size(0) == x.size(0) && grad.size(1) == height && x.size(1) == width);
        const int32_t* bounds = ends_of(ends, groups, x.size(0));
        Computing computing(threads);
        run_->grouped_outer(groups, bounds, height, width, grads, from, to, add, threads);
    }

    void newton_schulz(Tensor x, float a, float b, float c, int64_t steps, Tensor y, int threads) {
        const float* from = x.flat_floats();
        float* to = y.flat_floats();
        expect(x.dimensions() == 3 && y.dimensions() == 3 && x.numel() > 0);
        expect_equal(x, y, 3);
        Computing computing(threads);
        run_->newton_schulz(x.size(0), x.size(1), x.size(2), from, {a, b, c, steps}, to, threads);
    }

    std::vector<int64_t> draw(Tensor logits, const std::vector<int64_t>& rows, const std::vector<double>& temperatures,
                              const std::vector<uint64_t>& starts, int threads) {
        Rows table = logits.rows();
        expect(temperatures.size() == rows.size() && starts.size() == rows.size() && logits.size(1) > 0);
        for (int64_t row : rows) expect(0 <= row && row < logits.size(0));
        for (double temperature : temperatures) expect(temperature >= 0);
        std::vector<int64_t> winners(rows.size());
        Computing computing(threads);
        run_->draw(int64_t(rows.size()), logits.size(1), table, rows.data(), temperatures.data(), starts.data(), winners.data(), threads);
        return winners;
    }

    void counted_prior(Tensor entries, Tensor counts, Tensor index, int64_t index_shift, int64_t token_bits, Tensor discounts, Tensor base,
                       Tensor keys, Tensor probabilities, Tensor lengths, int threads) {
        const int64_t rows = keys.size(0), vocab = base.numel();
        CountedNgrams counted = counted_ngrams(entries, counts, index, index_shift, token_bits, discounts, base, keys);
        Rows out = probabilities.rows();
        const int64_t* contexts = keys.flat_longs();
        int64_t* longest = lengths.flat_longs();
        expect(lengths.numel() == rows && probabilities.size(0) == rows && probabilities.size(1) == vocab);
        Computing computing(threads);
        run_->counted_prior(rows, vocab, counted, contexts, out, longest, threads);
    }

    void counted_candidates(Tensor entries, Tensor counts, Tensor index, int64_t index_shift, int64_t token_bits, Tensor discounts,
                            Tensor base, Tensor keys, Tensor frequent, int64_t certain, int64_t likeliest, Tensor tokens, Tensor probabilities,
                            Tensor lengths, int threads) {
        const int64_t rows = keys.size(0), vocab = base.numel(), count = tokens.size(1);
        CountedNgrams counted = counted_ngrams(entries, counts, index, index_shift, token_bits, discounts, base, keys);
        tokens.indices(vocab);
        frequent.indices(vocab);
        Rows out = probabilities.rows();
        const int64_t *contexts = keys.flat_longs(), *most = frequent.flat_longs();
        int64_t *candidates = tokens.flat_longs(), *longest = lengths.flat_longs();
        expect(lengths.numel() == rows && tokens.size(0) == rows && probabilities.size(0) == rows && probabilities.size(1) == count);
        expect(0 <= certain && 0 <= likeliest && certain + likeliest <= count && certain + likeliest <= frequent.numel());
        Computing computing(threads);
        run_->counted_candidates(rows, vocab, counted, contexts, most, certain, likeliest, count, candidates, out, longest, threads);
    }

    void find_repeats(Tensor texts, Tensor numbers, int64_t window, const std::vector<int64_t>& lengths, Tensor found, int threads) {
        const int64_t batch = texts.size(0), size = texts.size(1), fresh = found.size(1), kinds = int64_t(lengths.size());
        const int64_t *tokens = texts.flat_longs(), *marks = numbers.flat_longs();
        int64_t* out = found.flat_longs();
        expect(numbers.numel() == batch * size && found.numel() == batch * fresh * 2 && fresh <= size && window > 0);
        expect(0 < kinds && kinds <= kMostRepeatLengths && lengths[0] > 0 && std::is_sorted(lengths.begin(), lengths.end()));
        Computing computing(threads);
        run_->find_repeats(batch, size, fresh, tokens, marks, window, lengths.data(), kinds, out, threads);
    }

  private:
    static CountedNgrams counted_ngrams(Tensor entries, Tensor counts, Tensor index, int64_t index_shift, int64_t token_bits,
                                        Tensor discounts, Tensor base, Tensor keys) {
        const int64_t orders = keys.size(1);
        CountedNgrams counted = {entries.flat_longs(), counts.flat_shorts(), entries.numel(), index.flat_longs(), index_shift, token_bits,
                                 orders, discounts.flat_floats(), base.flat_floats()};
        expect(counts.numel() == counted.size && orders <= kMostOrders && discounts.numel() == 4 * orders);
        expect(0 < token_bits && token_bits < 60);
        expect(0 < index_shift && index_shift < 63 && index.numel() == (int64_t{1} << (63 - index_shift)) + 1);
        expect(counted.index[index.numel() - 1] == counted.size);
        return counted;
    }

    const Kernels* run_;
};

void pin_threads(const std::vector<int>& processors) {
#if defined(__linux__)
#pragma omp parallel num_threads(static_cast<int>(processors.size()))
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(processors[omp_get_thread_num()], &set);
        sched_setaffinity(0, sizeof set, &set);
    }
#endif
}

}  // namespace

const Kernels* shoal::kernels_named(const std::string& name) {
    for (const Variant& variant : all_variants())
        if (variant.name == name && variant.runs_here) return variant.kernels;
    throw nb::value_error(("this processor has no kernels named " + name).c_str());
}

NB_MODULE(_cpu, m) {
    nb::set_leak_warnings(false);  // the kernels chosen at import live as long as the interpreter
    bind_decoder(m);
    m.def("pin_threads", &pin_threads, "Bind the calling thread and those that compute with it to one of the processors each.");
    m.def("supported", &supported, "Names of the instruction sets that this processor runs, best first.");
    nb::class_<Cpu>(m, "Cpu")
        .def(nb::init<const std::string&>())
        .def("rms_norm", &Cpu::rms_norm, nb::arg("x"), nb::arg("weight").none(), nb::arg("eps"), nb::arg("y"), nb::arg("threads"))
        .def("rms_norm_backward", &Cpu::rms_norm_backward, nb::arg("x"), nb::arg("weight").none(), nb::arg("eps"), nb::arg("grad"),
             nb::arg("grad_x"), nb::arg("grad_weight").none(), nb::arg("threads"))
        .def("swiglu", &Cpu::swiglu)
        .def("swiglu_backward", &Cpu::swiglu_backward)
        .def("rope", &Cpu::rope)
        .def("attention", &Cpu::attention)
        .def("attention_backward", &Cpu::attention_backward)
        .def("cross_entropy", &Cpu::cross_entropy, nb::arg("logits"), nb::arg("targets"), nb::arg("softcap").none(), nb::arg("with_grad"),
             nb::arg("nats"), nb::arg("threads"))
        .def("combine", &Cpu::combine, nb::arg("x"), nb::arg("weights").none(), nb::arg("index"), nb::arg("y"), nb::arg("threads"))
        .def("combine_backward", &Cpu::combine_backward)
        .def("sampled_cross_entropy", &Cpu::sampled_cross_entropy, nb::arg("hidden"), nb::arg("weight"), nb::arg("tokens"),
             nb::arg("log_weights"), nb::arg("shares"), nb::arg("more").none(), nb::arg("losses"), nb::arg("nats"), nb::arg("grad_logits"),
             nb::arg("grad_hidden"), nb::arg("threads"))
        .def("add_to_rows", &Cpu::add_to_rows)
        .def("grouped_product", &Cpu::grouped_product)
        .def("grouped_outer", &Cpu::grouped_outer)
        .def("newton_schulz", &Cpu::newton_schulz)
        .def("draw", &Cpu::draw)
        .def("counted_prior", &Cpu::counted_prior)
        .def("counted_candidates", &Cpu::counted_candidates)
        .def("find_repeats", &Cpu::find_repeats);
}
