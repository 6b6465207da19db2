"""Many processes: who holds which part of a model, and how tokens, gradients and figures travel between them."""

from .dispatch import TravellingDispatcher as TravellingDispatcher
from .dispatch import make_dispatcher as make_dispatcher
from .layout import Layout as Layout
from .layout import micro_batch as micro_batch
from .matrices import SplitMatrices as SplitMatrices
from .overlap import Halves as Halves
from .pipeline import Pipeline as Pipeline
from .shards import Piece as Piece
from .shards import Shards as Shards
from .shards import divide as divide
from .team import Team as Team
from .team import is_member as is_member
from .team import join as join
