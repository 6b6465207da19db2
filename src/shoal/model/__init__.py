"""The mathematics: one transformer, Llama-style or DeepSeek-style by configuration."""

from .attention import GQA as GQA
from .attention import MLA as MLA
from .attention import Context as Context
from .attention import LayerCache as LayerCache
from .init import init_weights as init_weights
from .moe import Dispatcher as Dispatcher
from .moe import LocalDispatcher as LocalDispatcher
from .moe import MoE as MoE
from .moe import Router as Router
from .moe import RoutingStats as RoutingStats
from .transformer import Output as Output
from .transformer import Transformer as Transformer
