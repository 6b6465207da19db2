// The engine's kernels as Python objects: a decoder that holds a model's packed weights, and single products.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "module.h"
#include "tensor.h"
#include "weights.h"

namespace nb = nanobind;
using namespace shoal;
using std::optional;

namespace {

[[noreturn]] void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

void expect(bool holds, const std::string& what) {
    if (!holds) refuse(what);
}

Tensor tensor_of(nb::handle object, const char* name) {
    Tensor tensor;
    expect(tensor.view(object), std::string(name) + " is not a plain tensor on the CPU");
    return tensor;
}

// A shoal.kernels.packed.PackedMatrix, its shapes checked against each other.
Matrix matrix_of(nb::handle packed, const char* name) {
    Matrix m;
    const std::string format = nb::cast<std::string>(packed.attr("format")), where = name;
    m.rows = nb::cast<int64_t>(packed.attr("rows"));
    m.columns = nb::cast<int64_t>(packed.attr("columns"));
    m.group = nb::cast<int64_t>(packed.attr("group"));
    nb::object data_object = packed.attr("data");
    const Tensor data = tensor_of(data_object, name);
    const int n = data.dimensions();
    expect(n >= 3 && m.rows > 0 && m.columns > 0, where + " is not a packed matrix");
    for (int i = 0; i < n - 3; ++i) m.leading *= data.size(i);
    m.data = data.bytes();
    const int64_t tiles = m.tiles();
    expect(data.size(n - 3) == tiles, where + ": the number of tiles is wrong");
    if (format == "fp32" || format == "bf16") {
        m.format = format == "fp32" ? Format::fp32 : Format::bf16;
        expect(format == "fp32" ? data.is_float() : data.is_bfloat(), where + ": the number format is wrong");
        expect(data.size(n - 2) == m.columns && data.size(n - 1) == kTile, where + ": the shape is wrong");
        m.data_stride = tiles * m.columns * kTile * (format == "fp32" ? 4 : 2);
        return m;
    }
    expect(format == "int8" || format == "int4", where + ": unknown format " + format);
    m.format = format == "int8" ? Format::int8 : Format::int4;
    expect(m.group == 32 || m.group == 64, where + ": groups must have 32 or 64 columns");
    const int64_t groups = (m.columns + m.group - 1) / m.group, lines = groups * m.group / (format == "int8" ? 4 : 8);
    expect(data.is_byte() && data.size(n - 2) == lines && data.size(n - 1) == 64, where + ": the shape is wrong");
    nb::object object = packed.attr("scales");
    expect(!object.is_none(), where + " has no scales");
    const Tensor scales = tensor_of(object, name);
    expect(scales.is_half() && scales.dimensions() == n && scales.numel() == m.leading * tiles * groups * kTile &&
               scales.size(n - 1) == kTile,
           where + ": the shape of its scales is wrong");
    m.scales = reinterpret_cast<const uint16_t*>(scales.bytes());
    m.data_stride = tiles * lines * 64, m.scale_stride = tiles * groups * kTile;
    return m;
}

struct FreeWorkspace {
    Workspace memory;
    ~FreeWorkspace() { free(memory.data); }
};

// The name of a weight among all layers'; -1: of the model itself.
std::string key_of(int64_t layer, const std::string& name) { return std::to_string(layer) + "." + name; }

// Reads the weights of one layer after the other and keeps their Python objects alive.
class Reader {
  public:
    explicit Reader(std::map<std::string, nb::object>& kept) : kept_(kept) {}

    void next_layer() { ++layer_; }

    bool has(nb::dict from, const char* name) const { return from.contains(name); }
    Matrix matrix(nb::dict from, const char* name, int64_t rows, int64_t columns, int64_t leading = 1) {
        nb::object packed = find(from, name);
        Matrix m = matrix_of(packed, name);
        expect(m.rows == rows && m.columns == columns && m.leading == leading,
               std::string(name) + " has another shape than the configuration says");
        if (m.quantized()) {
            expect(!group_ || group_ == m.group, "all quantized matrices of a model must have the same group size");
            group_ = m.group;
        }
        return m;
    }
    const float* vector(nb::dict from, const char* name, int64_t size) {
        nb::object object = find(from, name);
        const Tensor tensor = tensor_of(object, name);
        expect(tensor.numel() == size, std::string(name) + " has another size than the configuration says");
        return tensor.flat_floats();
    }
    nb::object find(nb::dict from, const char* name) {
        expect(from.contains(name), std::string("the weights lack ") + name);
        nb::object object = from[name];
        kept_[key_of(layer_, name)] = object;
        return object;
    }
    int64_t group() const { return group_; }

  private:
    std::map<std::string, nb::object>& kept_;
    int64_t layer_ = -1, group_ = 0;
};

class Decoder {
  public:
    // `shape`: numbers by name; `top`: embedding, norm, head; `layers`: one dict of weights each, MTP modules last.
    Decoder(const std::string& isa, nb::dict shape, nb::dict top, nb::list layers, int64_t main_layers) : run_(kernels_named(isa)) {
        auto number = [&](const char* name) { return nb::cast<int64_t>(shape[name]); };
        auto real = [&](const char* name) { return nb::cast<float>(shape[name]); };
        Model& m = model_;
        m.hidden = number("hidden"), m.vocabulary = number("vocabulary"), m.heads = number("heads");
        m.latent = number("latent"), m.nope = number("nope"), m.rope = number("rope"), m.value = number("value"), m.rank = number("rank");
        m.q_rank = number("q_rank"), m.kv_heads = number("kv_heads"), m.head = number("head");
        m.softmax_scale = real("softmax_scale"), m.norm_eps = real("norm_eps"), m.latent_norm_eps = real("latent_norm_eps");
        m.qk_norm_eps = real("qk_norm_eps"), m.softcap = real("softcap");
        m.experts = number("experts"), m.per_token = number("per_token"), m.groups = number("groups");
        m.open_groups = number("open_groups"), m.sigmoid = number("sigmoid"), m.biased = number("biased");
        m.normalise = number("normalise"), m.routed_scale = real("routed_scale");
        main_layers_ = main_layers;
        Reader read(kept_);
        nb::object table = read.find(top, "embedding");
        const Tensor embedding = tensor_of(table, "embedding");
        expect(embedding.dimensions() == 2 && embedding.size(0) == m.vocabulary && embedding.size(1) == m.hidden,
               "the embedding has another shape than the configuration says");
        expect(embedding.is_float() || embedding.is_bfloat(), "the embedding must be fp32 or bf16");
        m.embedding = embedding.bytes();
        m.embedding_format = embedding.is_float() ? Format::fp32 : Format::bf16;
        m.norm = read.vector(top, "norm", m.hidden);
        m.head_matrix = read.matrix(top, "head", m.vocabulary, m.hidden);
        for (nb::handle item : layers) {
            read.next_layer();
            layers_.push_back(layer_of(read, nb::cast<nb::dict>(item)));
        }
        expect(main_layers_ <= static_cast<int64_t>(layers_.size()), "there are fewer layers than the configuration says");
        m.layers = layers_.data();
        m.group = read.group();
    }

    // ids, positions [T], starts [S + 1]: int64; tables [S, P]: int32. hidden [T, D]; experts [mixtures, T, K] int32 or None.
    void forward(Tensor ids, Tensor positions, Tensor starts, Tensor tables, Tensor cos, Tensor sin, Tensor cache, Tensor hidden,
                 optional<Tensor> experts, int threads) {
        const Step step = step_of(ids, positions, starts, tables, cos, sin, cache);
        float* out = rows_of(hidden, step.tokens);
        int32_t* chosen = nullptr;
        if (experts) {
            expect(experts->numel() == mixtures_ * step.tokens * model_.per_token, "the tensor for the experts has the wrong size");
            chosen = experts->flat_ints();
        }
        Computing computing(threads);
        run_->decoder_forward(model_, main_layers_, step, out, chosen, workspace_.memory, threads);
    }

    // Guesses with MTP module 1. It runs over a step's positions (`next_ids` are the tokens that follow them); then counts[s] tokens that come
    // after those are drawn for sequence s, from the module's output at the last position, then from its output on its own guesses. `races`
    // holds where the random numbers of every guess begin, sequence by sequence, and so does what is returned hold the guesses: -1
    // from where logits were no numbers. logits [n, V]: those of the first guesses of the n sequences that want some.
    std::vector<int64_t> guess(Tensor ids, Tensor next_ids, Tensor positions, Tensor starts, Tensor tables, Tensor cos, Tensor sin,
                               Tensor cache, Tensor previous, Tensor logits, const std::vector<int64_t>& counts,
                               const std::vector<double>& temperatures, const std::vector<uint64_t>& races, int threads) {
        expect(main_layers_ < static_cast<int64_t>(layers_.size()), "the model has no MTP module");
        Step step = step_of(ids, positions, starts, tables, cos, sin, cache);
        expect(next_ids.numel() == step.tokens, "the shapes of a step do not fit");
        step.next_ids = next_ids.indices(model_.vocabulary);
        const float* from = rows_of(previous, step.tokens);
        float* first = logits.flat_floats();
        const std::vector<Guesser> guessers = guessers_of(step, counts, temperatures, cos.size(0));
        int64_t wanted = 0;
        for (int64_t count : counts) wanted += count;
        expect(static_cast<int64_t>(races.size()) == wanted, "every guess needs its own random numbers");
        expect(logits.numel() == static_cast<int64_t>(guessers.size()) * model_.vocabulary, "the tensor for the logits has the wrong size");
        std::vector<int64_t> tokens(wanted, -1);
        Computing computing(threads);
        guess_all(step, from, guessers, temperatures, races, first, tokens, threads);
        return tokens;
    }

    // hidden [M, D] -> logits [M, V].
    void logits(Tensor hidden, Tensor out, int threads) {
        const int64_t tokens = hidden.size(0);
        const float* from = rows_of(hidden, tokens);
        float* to = out.flat_floats();
        expect(out.numel() == tokens * model_.vocabulary, "the tensor for the logits has the wrong size");
        Computing computing(threads);
        run_->packed_linear(model_.head_matrix, tokens, from, model_.softcap, to, workspace_.memory, threads);
    }

    // The same matrix at another place in memory; nothing may run meanwhile. layer -1: the head.
    void replace(int64_t layer, const std::string& name, nb::object packed) {
        expect(layer >= -1 && layer < static_cast<int64_t>(layers_.size()), "there is no such layer");
        const Matrix moved = matrix_of(packed, name.c_str());
        Matrix& old = layer < 0 ? model_.head_matrix : slot(layers_[layer], name);
        expect(moved.format == old.format && moved.rows == old.rows && moved.columns == old.columns && moved.leading == old.leading &&
                   moved.group == old.group,
               name + " is not the same matrix");
        old = moved;
        kept_[key_of(layer, name)] = packed;
    }

  private:
    const Kernels* run_;
    Model model_ = {};
    int64_t main_layers_ = 0, mixtures_ = 0;
    std::vector<Layer> layers_;
    std::map<std::string, nb::object> kept_;
    FreeWorkspace workspace_;

    Layer layer_of(Reader& read, nb::dict w) {
        const Model& m = model_;
        Layer l;
        l.input_norm = read.vector(w, "input_norm", m.hidden), l.post_norm = read.vector(w, "post_norm", m.hidden);
        if (m.latent) {
            const int64_t queries = m.heads * (m.nope + m.rope);
            if (m.q_rank) {
                l.q_a = read.matrix(w, "q_a", m.q_rank, m.hidden);
                l.q_a_norm = read.vector(w, "q_a_norm", m.q_rank);
            }
            l.q = read.matrix(w, "q", queries, m.q_rank ? m.q_rank : m.hidden);
            l.kv_a = read.matrix(w, "kv_a", m.rank + m.rope, m.hidden);
            l.kv_a_norm = read.vector(w, "kv_a_norm", m.rank);
            l.k_up = read.matrix(w, "k_up", m.rank, m.nope, m.heads);
            l.v_up = read.matrix(w, "v_up", m.value, m.rank, m.heads);
            l.o = read.matrix(w, "o", m.hidden, m.heads * m.value);
        } else {
            l.q = read.matrix(w, "q", m.heads * m.head, m.hidden);
            l.k = read.matrix(w, "k", m.kv_heads * m.head, m.hidden);
            l.v = read.matrix(w, "v", m.kv_heads * m.head, m.hidden);
            l.o = read.matrix(w, "o", m.hidden, m.heads * m.head);
            if (read.has(w, "q_bias")) {
                l.q_bias = read.vector(w, "q_bias", m.heads * m.head);
                l.k_bias = read.vector(w, "k_bias", m.kv_heads * m.head);
                l.v_bias = read.vector(w, "v_bias", m.kv_heads * m.head);
            }
        }
        if (read.has(w, "value_embedding"))
            l.value_embedding = read.vector(w, "value_embedding", m.vocabulary * (m.latent ? m.rank : m.kv_heads * m.head));
        if (read.has(w, "router")) {
            l.router = read.matrix(w, "router", m.experts, m.hidden);
            if (m.biased) l.router_bias = read.vector(w, "router_bias", m.experts);
            l.experts = feed_forward_of(read, w, "expert_gate", "expert_up", "expert_down", m.experts);
            if (static_cast<int64_t>(layers_.size()) < main_layers_) l.mixture = mixtures_++;
        }
        if (read.has(w, "gate")) l.dense = feed_forward_of(read, w, "gate", "up", "down", 1);
        expect(l.router || l.dense.gate, "a layer has no feed-forward part");
        if (read.has(w, "join")) {
            l.join = read.matrix(w, "join", m.hidden, 2 * m.hidden);
            l.embedding_norm = read.vector(w, "embedding_norm", m.hidden);
            l.hidden_norm = read.vector(w, "hidden_norm", m.hidden);
            l.head_norm = read.vector(w, "head_norm", m.hidden);
        }
        return l;
    }

    static Matrix& slot(Layer& l, const std::string& name) {
        const std::pair<const char*, Matrix*> slots[] = {
            {"q_a", &l.q_a}, {"q", &l.q}, {"kv_a", &l.kv_a}, {"k_up", &l.k_up}, {"v_up", &l.v_up}, {"k", &l.k}, {"v", &l.v}, {"o", &l.o},
            {"gate", &l.dense.gate}, {"up", &l.dense.up}, {"down", &l.dense.down}, {"router", &l.router}, {"join", &l.join},
            {"expert_gate", &l.experts.gate}, {"expert_up", &l.experts.up}, {"expert_down", &l.experts.down}};
        for (const auto& [known, matrix] : slots)
            if (name == known && *matrix) return *matrix;
        refuse("the layer has no matrix " + name);
    }

    FeedForward feed_forward_of(Reader& read, nb::dict w, const char* gate, const char* up, const char* down, int64_t leading) {
        const int64_t width = nb::cast<int64_t>(w[gate].attr("rows"));
        return {read.matrix(w, gate, width, model_.hidden, leading), read.matrix(w, up, width, model_.hidden, leading),
                read.matrix(w, down, model_.hidden, width, leading)};
    }

    float* rows_of(const Tensor& rows, int64_t count) const {
        expect(rows.dimensions() == 2 && rows.size(0) == count && rows.size(1) == model_.hidden, "hidden states have the wrong shape");
        return rows.flat_floats();
    }

    // A sequence that wants guesses.
    struct Guesser {
        int64_t sequence, count;
        int64_t first;  // of its guesses
        int64_t row;    // of its last position
    };

    std::vector<Guesser> guessers_of(const Step& step, const std::vector<int64_t>& counts, const std::vector<double>& temperatures,
                                     int64_t positions) const {
        expect(static_cast<int64_t>(counts.size()) == step.sequences && temperatures.size() == counts.size(), "the shapes of a step do not fit");
        std::vector<Guesser> guessers;
        int64_t first = 0;
        for (int64_t s = 0; s < step.sequences; ++s) {
            expect(counts[s] >= 0 && temperatures[s] >= 0, "counts and temperatures must not be negative");
            if (!counts[s]) continue;
            const int64_t row = step.starts[s + 1] - 1, last = step.positions[row] + counts[s] - 1;  // the last position the module writes
            expect(last < positions && last / kPage < step.table_width, "the guesses have no room");
            for (int64_t p = step.positions[row] / kPage; p <= last / kPage; ++p) {
                const int32_t page = step.tables[s * step.table_width + p];
                expect(page >= 0 && page < step.cache.pages, "a page number is out of range");
            }
            guessers.push_back({s, counts[s], first, row});
            first += counts[s];
        }
        return guessers;
    }

    void guess_all(const Step& step, const float* previous, std::vector<Guesser> guessers, const std::vector<double>& temperatures,
                   const std::vector<uint64_t>& races, float* first_logits, std::vector<int64_t>& tokens, int threads) {
        const int64_t D = model_.hidden, V = model_.vocabulary, P = step.table_width;
        auto module = [&](const Step& part, const float* from, std::vector<float>& to) {
            to.resize(part.tokens * D);
            run_->decoder_draft(model_, main_layers_, part, from, to.data(), workspace_.memory, threads);
        };
        std::vector<float> made, rows, logits;
        module(step, previous, made);
        std::vector<int64_t> ids, next_ids, positions, starts;
        std::vector<int32_t> tables;
        for (int64_t depth = 0; !guessers.empty(); ++depth) {
            const int64_t n = guessers.size();
            rows.resize(n * D);
            for (int64_t i = 0; i < n; ++i) memcpy(&rows[i * D], &made[(depth ? i : guessers[i].row) * D], D * 4);
            if (depth) logits.resize(n * V);
            float* table = depth ? logits.data() : first_logits;
            run_->packed_linear(model_.head_matrix, n, rows.data(), model_.softcap, table, workspace_.memory, threads);
            std::vector<int64_t> index(n), winners(n);
            std::vector<double> heats(n);
            std::vector<uint64_t> begins(n);
            for (int64_t i = 0; i < n; ++i) {
                const Guesser& g = guessers[i];
                index[i] = i, heats[i] = temperatures[g.sequence], begins[i] = races[g.first + depth];
            }
            run_->draw(n, V, {table, V}, index.data(), heats.data(), begins.data(), winners.data(), threads);

            // The next pass: one position of each sequence that goes on.
            ids.clear(), next_ids.clear(), positions.clear(), tables.clear(), starts.assign(1, 0);
            int64_t left = 0;
            for (int64_t i = 0; i < n; ++i) {
                const Guesser g = guessers[i];
                if (winners[i] < 0) continue;
                tokens[g.first + depth] = winners[i];
                if (depth + 1 == g.count) continue;
                ids.push_back(depth ? tokens[g.first + depth - 1] : step.next_ids[g.row]);
                next_ids.push_back(winners[i]);
                positions.push_back(step.positions[g.row] + depth + 1);
                tables.insert(tables.end(), step.tables + g.sequence * P, step.tables + (g.sequence + 1) * P);
                starts.push_back(left + 1);
                memmove(&rows[left * D], &rows[i * D], D * 4);
                guessers[left++] = g;
            }
            guessers.resize(left);
            if (!left) return;
            Step next = step;
            next.tokens = next.sequences = left;
            next.ids = ids.data(), next.next_ids = next_ids.data(), next.positions = positions.data(), next.starts = starts.data();
            next.tables = tables.data();
            module(next, rows.data(), made);
        }
    }

    Step step_of(const Tensor& ids, const Tensor& positions, const Tensor& starts, const Tensor& tables, const Tensor& cos,
                 const Tensor& sin, const Tensor& cache) const {
        Step s = {};
        s.tokens = ids.numel(), s.sequences = starts.numel() - 1;
        const int64_t half = (model_.latent ? model_.rope : model_.head) / 2, width = model_.latent ? model_.rank + model_.rope : 2 * model_.kv_heads * model_.head;
        expect(cos.dimensions() == 2 && cos.size(1) == half && cos.numel() == sin.numel(), "the rotary tables have the wrong shape");
        expect(cache.dimensions() == 4 && cache.size(0) == static_cast<int64_t>(layers_.size()) && cache.size(2) == kPage && cache.size(3) == width,
               "the cache has the wrong shape");
        s.cache = {cache.bytes(), cache.is_float() ? Format::fp32 : cache.is_bfloat() ? Format::bf16 : Format::fp8, cache.size(1), width};
        expect(s.cache.format != Format::fp8 || cache.is_byte(), "the cache must be fp32, bf16 or bytes of fp8");
        s.ids = ids.indices(model_.vocabulary);
        s.positions = positions.indices(cos.size(0));
        s.starts = starts.indices(s.tokens + 1);
        s.tables = tables.flat_ints();
        expect(tables.dimensions() == 2 && tables.size(0) == s.sequences && positions.numel() == s.tokens && s.tokens > 0, "the shapes of a step do not fit");
        s.table_width = tables.size(1);
        expect(s.starts[0] == 0 && s.starts[s.sequences] == s.tokens, "the sequences of a step must cover its tokens");
        for (int64_t i = 0; i < s.sequences; ++i) {
            expect(s.starts[i] < s.starts[i + 1], "a sequence of a step has no tokens");
            for (int64_t t = s.starts[i]; t < s.starts[i + 1]; ++t)
                expect(s.positions[t] == s.positions[s.starts[i]] + t - s.starts[i], "positions must follow each other");
            const int64_t pages = s.positions[s.starts[i + 1] - 1] / kPage + 1;
            expect(pages <= s.table_width, "a page table is too short");
            for (int64_t p = 0; p < pages; ++p) {
                const int32_t page = s.tables[i * s.table_width + p];
                expect(page >= 0 && page < s.cache.pages, "a page number is out of range");
            }
        }
        s.cos = cos.flat_floats(), s.sin = sin.flat_floats();
        return s;
    }
};

// y [leading, tokens, rows] = packed x for x [tokens, columns].
void packed_linear(const std::string& isa, nb::handle packed, Tensor x, Tensor y, int threads) {
    const Matrix w = matrix_of(packed, "the matrix");
    const float* from = x.flat_floats();
    float* to = y.flat_floats();
    const int64_t tokens = x.size(0);
    expect(x.dimensions() == 2 && x.size(1) == w.columns && y.numel() == w.leading * tokens * w.rows, "the shapes of a product do not fit");
    const Kernels* run = kernels_named(isa);
    FreeWorkspace workspace;
    Computing computing(threads);
    run->packed_linear(w, tokens, from, 0, to, workspace.memory, threads);
}

}  // namespace

void shoal::bind_decoder(nb::module_& m) {
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<const std::string&, nb::dict, nb::dict, nb::list, int64_t>())
        .def("forward", &Decoder::forward, nb::arg("ids"), nb::arg("positions"), nb::arg("starts"), nb::arg("tables"), nb::arg("cos"),
             nb::arg("sin"), nb::arg("cache"), nb::arg("hidden"), nb::arg("experts").none(), nb::arg("threads"))
        .def("guess", &Decoder::guess)
        .def("logits", &Decoder::logits)
        .def("replace", &Decoder::replace);
    m.def("packed_linear", &packed_linear);
}
