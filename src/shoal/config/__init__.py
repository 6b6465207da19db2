"""Settings: dataclasses with validation, TOML recipes, dotted overrides. Knows nothing else of Shoal."""

from .bench import CASES as CASES
from .bench import BenchEngineCommand as BenchEngineCommand
from .bench import BenchQuantizationCommand as BenchQuantizationCommand
from .bench import Case as Case
from .commands import BenchTrainCommand as BenchTrainCommand
from .commands import ChatCommand as ChatCommand
from .commands import DoctorCommand as DoctorCommand
from .commands import EvalCommand as EvalCommand
from .commands import ExportCommand as ExportCommand
from .commands import GenerateCommand as GenerateCommand
from .commands import MachineOptions as MachineOptions
from .commands import QuantizeCommand as QuantizeCommand
from .engine import CacheFormat as CacheFormat
from .engine import EngineOptions as EngineOptions
from .engine import RunOptions as RunOptions
from .engine import SamplingOptions as SamplingOptions
from .errors import UserError as UserError
from .model import ModelConfig as ModelConfig
from .train import BalanceConfig as BalanceConfig
from .train import CheckpointConfig as CheckpointConfig
from .train import CorpusConfig as CorpusConfig
from .train import MTPConfig as MTPConfig
from .train import OptimizerConfig as OptimizerConfig
from .train import ScheduleConfig as ScheduleConfig
from .train import TrainConfig as TrainConfig
