"""The names of this package, for type checkers."""

from jaxadapt.configs.base import PEFT_VERSION as PEFT_VERSION
from jaxadapt.configs.base import Config as Config
from jaxadapt.configs.base import GenericConfig as GenericConfig
from jaxadapt.configs.base import dumps as dumps
from jaxadapt.configs.base import from_dict as from_dict
from jaxadapt.configs.base import loads as loads
from jaxadapt.configs.fixed_bases import *  # noqa: F403
from jaxadapt.configs.frozen import FrozenDict as FrozenDict
from jaxadapt.configs.frozen import freeze as freeze
from jaxadapt.configs.frozen import thaw as thaw
from jaxadapt.configs.full_rank import *  # noqa: F403
from jaxadapt.configs.lora import *  # noqa: F403
from jaxadapt.configs.low_rank import *  # noqa: F403
from jaxadapt.configs.prompts import *  # noqa: F403
from jaxadapt.configs.validation import TASK_TYPES as TASK_TYPES
