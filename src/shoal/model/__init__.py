"""The mathematics: one transformer, Llama-style or DeepSeek-style by configuration."""

from .attention import GQA as GQA
from .attention import LATENT_NORM_EPS as LATENT_NORM_EPS
from .attention import MLA as MLA
from .attention import Context as Context
from .block import Block as Block
from .documents import Documents as Documents
from .init import init_weights as init_weights
from .look_ups import LookUps as LookUps
from .moe import LocalDispatcher as LocalDispatcher
from .moe import MoE as MoE
from .moe import Router as Router
from .moe import RoutingStats as RoutingStats
from .rope import rotary_tables as rotary_tables
from .rope import softmax_scale as softmax_scale
from .transformer import Output as Output
from .transformer import Transformer as Transformer
