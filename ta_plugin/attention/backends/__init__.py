"""One file per backend of `weighted_attention`; `choose` picks one and can say why."""

from ta_plugin.attention.backends.choose import BACKENDS, BackendChoice, choose
from ta_plugin.attention.backends.machine import Machine

__all__ = ["BACKENDS", "BackendChoice", "Machine", "choose"]
