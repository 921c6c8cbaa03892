"""NVIDIA apex is taken where it is installed: its norms and its fused optimizer; without it torch's, as everywhere else in these tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAKE = {  # what Megatron-core imports of apex, and no more: the package of that name on PyPI is another one
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "class FusedLayerNormAffineFunction: pass",
    "apex/optimizers/__init__.py": """
import torch
class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, adam_w_mode=True, **options):
        super().__init__(params, **options)
class FusedSGD(torch.optim.SGD): pass
""",
}
CHOICES = """
import sys, torch
torch.cuda.is_available = lambda: sys.argv[1] == "cuda"
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core import optimizer
from ta_plugin.megatron.norm import RowNorm
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, persist_layer_norm=False)
print("chosen", type(RowNorm(config, 8)).__name__, optimizer.Adam.__name__)
"""


def chosen(path: Path, device: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, "-W", "ignore", "-c", CHOICES, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "chosen" in done.stdout, done.stderr[-3000:]
    return done.stdout.split("chosen ")[1].strip()


def test_apex_is_used_when_it_is_there(tmp_path: Path) -> None:
    for name, text in FAKE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert chosen(tmp_path, "cuda") == "FusedLayerNorm FusedAdam"
    assert chosen(tmp_path, "cpu").startswith("LayerNorm ")  # its kernels need CUDA


def test_torch_is_used_without_it(tmp_path: Path) -> None:
    assert chosen(tmp_path, "cuda") == "LayerNorm AdamW"
