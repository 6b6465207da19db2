"""Problems that need no download. `ENVIRONMENTS` knows them by name."""

from ..problems import Environment
from .arithmetic import Arithmetic
from .countdown import Countdown
from .sorting import Sorting
from .strings import Strings

ENVIRONMENTS: dict[str, Environment] = {environment.name: environment for environment in (Arithmetic(), Countdown(), Sorting(), Strings())}
