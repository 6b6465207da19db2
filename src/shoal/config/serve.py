"""Options of `shoal serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .commands import MachineOptions, Model
from .engine import EngineOptions
from .errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST_KEY = 8
"""Characters of an API key."""


@dataclass
class ServeCommand:
    """Serve MODEL to OpenAI and Anthropic clients, and on a page for the browser."""

    model: Model
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")]
    machine: Annotated[MachineOptions, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; 0.0.0.0 from everywhere: then set --api-key-file."""
    port: int = 8000
    """0: any that is free."""
    name: str | None = None
    """Of the model, as clients ask for it. None: the name of its folder."""
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only requests with this key are served; may be given more than once. Other users of the machine can see it: prefer a file."""
    api_key_file: str | None = None
    """File with one key a line."""
    cors_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Web site whose pages may use the API, such as https://chat.example.com; may be given more than once. Without: none."""
    chat_template: str | None = None
    """Jinja file to write conversations with, or r1 or v3.1 for DeepSeek's. None: the model's own."""
    max_waiting: int = 256
    """Requests that may wait for the engine; those beyond are told to come back later (429)."""
    max_body_mb: float = 8.0
    """Largest request, in MB; larger ones are refused (413)."""
    grace: float = 30.0
    """Seconds that running requests have to end after SIGTERM or Ctrl-C; new ones are refused (503)."""
    api_only: bool = False
    """Do not serve the page."""
    log_prompts: bool = False
    """Write what clients send to the log; without, the log names path, status and time alone."""

    def validate(self) -> None:
        """Raise `UserError` on the first option that cannot work."""
        self.engine.validate()
        if not 0 <= self.port < 65536:
            raise UserError(f"--port is {self.port}: it must lie between 0 and 65535")
        if self.max_waiting < 0:
            raise UserError(f"--max-waiting is {self.max_waiting}: it must be 0 or more")
        if not 0 < self.max_body_mb <= 1024:
            raise UserError(f"--max-body-mb is {self.max_body_mb}: it must be more than 0 and at most 1024")
        if not 0 <= self.grace < float("inf"):
            raise UserError(f"--grace is {self.grace}: it must be 0 or more")
        for origin in self.cors_origin:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise UserError(f"--cors-origin is {origin}: it must begin with http:// or https://, or be *")
            if origin.count("/") > 2:
                raise UserError(f"--cors-origin is {origin}: browsers name a site without a slash or path behind it, as {_site(origin)}")
        self.keys()

    def keys(self) -> tuple[str, ...]:
        """All API keys. Raises `UserError` if one is too short or the file cannot be read."""
        keys = list(self.api_key)
        if self.api_key_file is not None:
            file = Path(self.api_key_file).expanduser()
            if not file.is_file():
                raise UserError(f"there is no file of API keys at {file}")
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
            from_file = [line for line in lines if line and not line.startswith("#")]
            if not from_file:
                raise UserError(f"{file} holds no API key: write one a line")
            keys += from_file
        if any(len(key) < LEAST_KEY for key in keys):
            raise UserError(f"an API key is shorter than {LEAST_KEY} characters: take a longer one")
        if not all(key.isascii() and key.isprintable() for key in keys):
            raise UserError("an API key holds other than printable ASCII characters, which clients cannot send: take another one")
        return tuple(keys)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


def _site(origin: str) -> str:
    return "/".join(origin.split("/")[:3])


def serve_options(model: str, **options: Any) -> ServeCommand:
    """The command with everything else as it is by default."""
    return ServeCommand(model, options.pop("engine", None) or EngineOptions(), options.pop("machine", None) or MachineOptions(), **options)
