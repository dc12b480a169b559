"""The names of this package, for type checkers."""

from jaxadapt.merging.combination import resize_rank as resize_rank
from jaxadapt.merging.combination import to_lora as to_lora
from jaxadapt.merging.pairs import convert_variant as convert_variant
from jaxadapt.merging.pairs import plain_lora as plain_lora
