"""The names of this package, for type checkers."""

from jaxadapt.configs.matching import MethodInfo as MethodInfo
from jaxadapt.configs.matching import describe_methods as describe_methods
from jaxadapt.methods.applied import AppliedMethod as AppliedMethod
from jaxadapt.methods.base import METHODS as METHODS
from jaxadapt.methods.base import Change as Change
from jaxadapt.methods.base import Drop as Drop
from jaxadapt.methods.base import Effects as Effects
from jaxadapt.methods.base import Method as Method
from jaxadapt.methods.base import Start as Start
from jaxadapt.methods.base import Target as Target
from jaxadapt.methods.base import get_method as get_method
from jaxadapt.methods.base import register as register
from jaxadapt.methods.matrix import MatrixMethod as MatrixMethod
