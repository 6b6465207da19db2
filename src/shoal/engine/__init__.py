"""Runs models: cache, scheduling, sampling, speculation, and the engine that serves many requests at once."""

from .async_engine import AsyncEngine as AsyncEngine
from .async_engine import EngineClosed as EngineClosed
from .async_engine import EngineFailed as EngineFailed
from .command import complete as complete
from .engine import Engine as Engine
from .engine import EngineStats as EngineStats
from .load import Loaded as Loaded
from .load import Plain as Plain
from .load import load as load
from .load import load_plain as load_plain
from .load import load_transformer as load_transformer
from .load import make_runner as make_runner
from .requests import FinishReason as FinishReason
from .requests import Increment as Increment
from .requests import PromptReport as PromptReport
from .requests import Request as Request
from .requests import Result as Result
from .requests import Token as Token
from .requests import TokenMask as TokenMask
from .runner import PAGE as PAGE
from .runner import Batch as Batch
from .runner import Forward as Forward
from .runner import Runner as Runner
from .runner import TorchRunner as TorchRunner
from .text import TextStream as TextStream
