"""The names of this package, for type checkers."""

from jaxadapt import analysis as analysis
from jaxadapt import export as export
from jaxadapt import initializers as initializers
from jaxadapt import merging as merging
from jaxadapt import methods as methods
from jaxadapt import models as models
from jaxadapt import serving as serving
from jaxadapt.adapters.adapter import Adapter as Adapter
from jaxadapt.adapters.peft_tensors import PeftTensors as PeftTensors
from jaxadapt.configs.base import Config as Config
from jaxadapt.configs.base import GenericConfig as GenericConfig
from jaxadapt.configs.fixed_bases import *  # noqa: F403
from jaxadapt.configs.full_rank import *  # noqa: F403
from jaxadapt.configs.lora import *  # noqa: F403
from jaxadapt.configs.low_rank import *  # noqa: F403
from jaxadapt.configs.prompts import *  # noqa: F403
from jaxadapt.core.errors import AdapterError as AdapterError
from jaxadapt.core.errors import AttachError as AttachError
from jaxadapt.core.errors import ConfigError as ConfigError
from jaxadapt.core.errors import FileError as FileError
from jaxadapt.core.errors import FormatError as FormatError
from jaxadapt.core.errors import KeyMapError as KeyMapError
from jaxadapt.core.errors import MismatchError as MismatchError
from jaxadapt.core.errors import TargetError as TargetError
from jaxadapt.keymaps.keymap import KeyMap as KeyMap
from jaxadapt.keymaps.weight import Weight as Weight
from jaxadapt.merging.base_merge import merge as merge
from jaxadapt.merging.base_merge import unmerge as unmerge
from jaxadapt.merging.combination import combine as combine
from jaxadapt.models.attachment import activate as activate
from jaxadapt.models.attachment import adapt as adapt
from jaxadapt.models.attachment import delete as delete
from jaxadapt.models.attachment import detach as detach
from jaxadapt.models.attachment import disable as disable
from jaxadapt.models.attachment import extract as extract
from jaxadapt.models.attachment import init as init
from jaxadapt.models.attachment import inject as inject
from jaxadapt.models.graph import AdapterParam as AdapterParam
from jaxadapt.models.summary_table import select as select
from jaxadapt.models.summary_table import summary as summary
from jaxadapt.persistence.consumers import Card as Card
from jaxadapt.persistence.folder import inspect as inspect
from jaxadapt.persistence.folder import push as push
from jaxadapt.persistence.folder import read as read
from jaxadapt.persistence.folder import read_config as read_config
from jaxadapt.persistence.folder import write as write
from jaxadapt.persistence.load_adapter import from_peft as from_peft
from jaxadapt.persistence.load_adapter import load as load
from jaxadapt.persistence.save_adapter import MultihostFolder as MultihostFolder
from jaxadapt.persistence.save_adapter import save as save
from jaxadapt.persistence.save_adapter import to_peft as to_peft
from jaxadapt.persistence.verify_folder import repair as repair
from jaxadapt.persistence.verify_folder import verify as verify
from jaxadapt.storage.hub import pull as pull
from jaxadapt.training import optim as optim
from jaxadapt.training.checkpoint import CheckpointManager as CheckpointManager

__version__: str
