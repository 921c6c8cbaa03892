"""One file per backend of `weighted_attention`; `choose` picks one and can say why."""

from ta_plugin.attention.backends.choose import BackendChoice, choose

__all__ = ["BackendChoice", "choose"]
