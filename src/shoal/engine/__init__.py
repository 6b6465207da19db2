"""Runs models: cache, scheduling, sampling, speculation, and the engine that serves many requests at once."""

from .async_engine import AsyncEngine as AsyncEngine
from .async_engine import EngineClosed as EngineClosed
from .async_engine import EngineFailed as EngineFailed
from .batch import PAGE as PAGE
from .batch import Batch as Batch
from .command import complete as complete
from .engine import Engine as Engine
from .engine import EngineStats as EngineStats
from .load import Loaded as Loaded
from .load import Plain as Plain
from .load import load as load
from .load import load_plain as load_plain
from .places import EngineProcess as EngineProcess
from .places import EngineThread as EngineThread
from .places import Place as Place
from .requests import Increment as Increment
from .requests import PromptReport as PromptReport
from .requests import Request as Request
from .requests import Result as Result
from .requests import Token as Token
from .runner import Forward as Forward
from .runner import Runner as Runner
from .runner import TorchRunner as TorchRunner
from .text import TextStream as TextStream
