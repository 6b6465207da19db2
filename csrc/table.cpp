// This instruction set's table of kernels.
#include <type_traits>

#include "kernels.h"
#include "weights.h"

namespace shoal::SHOAL_ISA {

#define SHOAL_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name
SHOAL_DECLARE(rms_norm);
SHOAL_DECLARE(rms_norm_backward);
SHOAL_DECLARE(swiglu);
SHOAL_DECLARE(swiglu_backward);
SHOAL_DECLARE(rope);
SHOAL_DECLARE(attention);
SHOAL_DECLARE(attention_backward);
SHOAL_DECLARE(cross_entropy);
SHOAL_DECLARE(sampled_cross_entropy);
SHOAL_DECLARE(add_to_rows);
SHOAL_DECLARE(combine);
SHOAL_DECLARE(combine_backward);
SHOAL_DECLARE(grouped_product);
SHOAL_DECLARE(grouped_outer);
SHOAL_DECLARE(newton_schulz);
SHOAL_DECLARE(draw);
SHOAL_DECLARE(counted_prior);
SHOAL_DECLARE(counted_candidates);
SHOAL_DECLARE(find_repeats);
SHOAL_DECLARE(decoder_forward);
SHOAL_DECLARE(decoder_draft);
SHOAL_DECLARE(packed_linear);

const Kernels kernels = {
    rms_norm,           rms_norm_backward, swiglu,                swiglu_backward, rope,          attention,
    attention_backward, cross_entropy,     sampled_cross_entropy, add_to_rows,     combine,       combine_backward,
    grouped_product,    grouped_outer,     newton_schulz,         draw,            counted_prior, counted_candidates,
    find_repeats,       decoder_forward,   decoder_draft,         packed_linear,
};

}  // namespace shoal::SHOAL_ISA
