"""The names of this package, for type checkers."""

from jaxadapt.persistence.folder import inspect as inspect
from jaxadapt.persistence.folder import read as read
from jaxadapt.persistence.folder import read_config as read_config
from jaxadapt.persistence.folder import write as write
from jaxadapt.persistence.load_adapter import load as load
from jaxadapt.persistence.peft import from_peft as from_peft
from jaxadapt.persistence.peft import to_peft as to_peft
from jaxadapt.persistence.save_adapter import save as save
from jaxadapt.persistence.upload import push as push
from jaxadapt.persistence.verify_folder import repair as repair
from jaxadapt.persistence.verify_folder import verify as verify
from jaxadapt.storage.hub import pull as pull
