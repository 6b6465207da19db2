"""The hot operations, one function each; which kernels run them is decided once, at import."""

from .counted import CountTables as CountTables
from .counted import counted_candidates as counted_candidates
from .counted import counted_prior as counted_prior
from .cross_entropy import CrossEntropy as CrossEntropy
from .cross_entropy import linear_cross_entropy as linear_cross_entropy
from .grouped import grouped_linear as grouped_linear
from .grouped import grouped_linear_gradients as grouped_linear_gradients
from .linear import linear as linear
from .linear import linear_gradients as linear_gradients
from .linear import weight_gradient as weight_gradient
from .ops import apply_rope as apply_rope
from .ops import causal_attention as causal_attention
from .ops import combine_tokens as combine_tokens
from .ops import newton_schulz as newton_schulz
from .ops import permute_tokens as permute_tokens
from .ops import rms_norm as rms_norm
from .ops import sort_by_expert as sort_by_expert
from .ops import swiglu as swiglu
from .repeats import find_repeats as find_repeats
from .sampled import Candidates as Candidates
from .sampled import sampled_cross_entropy as sampled_cross_entropy
