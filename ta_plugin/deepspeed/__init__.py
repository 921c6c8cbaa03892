"""The DeepSpeed plugin: the "tokenized_attention" block of a DeepSpeed config (the only package that imports the engine)."""

from ta_plugin.deepspeed.activate import Activation, initialize, install, is_installed, prepare, uninstall
from ta_plugin.deepspeed.config import RowOptimizerConfig, TokenizedAttentionConfig
from ta_plugin.deepspeed.convert import Conversion
from ta_plugin.deepspeed.loss import sequence_parallel_loss
from ta_plugin.deepspeed.mpu import MegatronMPU
from ta_plugin.deepspeed.sharding import RoutedTokenEmbedding
from ta_plugin.deepspeed.ulysses import TokenizedUlyssesAttention

__all__ = [
    "Activation",
    "Conversion",
    "MegatronMPU",
    "RoutedTokenEmbedding",
    "RowOptimizerConfig",
    "TokenizedAttentionConfig",
    "TokenizedUlyssesAttention",
    "initialize",
    "install",
    "is_installed",
    "prepare",
    "sequence_parallel_loss",
    "uninstall",
]
