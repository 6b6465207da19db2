"""What lies on disk: Hugging Face folders and training checkpoints."""

from .checkpoints import clean_temporary as clean_temporary
from .checkpoints import complete_checkpoints as complete_checkpoints
from .checkpoints import load_checkpoint_state as load_checkpoint_state
from .checkpoints import prune as prune
from .checkpoints import save_checkpoint as save_checkpoint
from .export import export_model as export_model
from .huggingface import load_model as load_model
from .huggingface import load_state as load_state
from .huggingface import read_config as read_config
from .huggingface import save_model as save_model
from .locate import locate_model as locate_model
