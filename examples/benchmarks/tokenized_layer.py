"""A Megatron TransformerLayer on distinct tokens against the same layer over positions, forward and backward.

    python examples/benchmarks/tokenized_layer.py [--device cuda] [--rounds 7]

Both layers are Megatron-core's local modules with the same weights. The peer runs on every position with the fastest attention found
here: cuDNN or flash attention through torch, or flash-attn-4 where it is installed. The tokenized layer's time holds its plan
(UniqueSpace), its forward on rows, and its backward. Expanding rows to positions is left out: it happens once per stack. Bidirectional,
dropout 0, equal lengths. The two take turns; figures are medians of wall seconds, and the ratio is of medians.

Text: English of the Python documentation (pydoc's topics) and the standard library's source, each through a byte-pair tokenizer trained
on it. Items: Zipf with exponent 1.05 over 50 million ids.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import Table, conditions
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ta_plugin.megatron.layer_specs import get_tokenized_layer_spec
from ta_plugin.megatron.plan import layout_of, plan_microbatch

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, L, H, D) three times -> (B, L, H, D)


def by_sdpa(backend: SDPBackend) -> Attention:
    """torch's scaled_dot_product_attention with one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def by_flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn-4."""
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def peers(device: str) -> dict[str, Attention]:
    """Attention over positions, every kernel that may run here."""
    if device == "cpu":
        return {"torch flash": by_sdpa(SDPBackend.FLASH_ATTENTION)}
    found = {"cuDNN": by_sdpa(SDPBackend.CUDNN_ATTENTION), "torch flash": by_sdpa(SDPBackend.FLASH_ATTENTION)}
    return {**found, "flash-attn-4": by_flash4} if find_spec("flash_attn") else found


class PositionAttention(MegatronModule):
    """The core attention of the peer: (L, B, H, D) to (L, B, H * D), by the attention of its config."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)
        self.attend: Attention | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """Every position onto every position of its sample."""
        assert self.attend is not None
        return self.attend(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1).flatten(2)


@dataclass(frozen=True)
class Layers:
    """Two layers with the same weights, and the table their inputs come from (V, hidden)."""

    tokenized: nn.Module
    positions: nn.Module
    table: Tensor

    @classmethod
    def of(cls, args: argparse.Namespace, vocab: int) -> Layers:
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        config = TransformerConfig(
            num_layers=1,
            hidden_size=args.hidden,
            num_attention_heads=args.heads,
            ffn_hidden_size=4 * args.hidden,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_cpu_initialization=True,
            inference_rng_tracker=True,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        ours = get_tokenized_layer_spec(config, use_transformer_engine=False)
        tokenized = build_module(ours, config=config, layer_number=1, pg_collection=groups)
        stock = copy(get_gpt_layer_local_spec())
        attention = copy(stock.submodules.self_attention)
        attention.params = {**attention.params, "attn_mask_type": AttnMaskType.no_mask}
        attention.submodules = replace(attention.submodules, core_attention=PositionAttention)
        stock.submodules = replace(stock.submodules, self_attention=attention)
        positions = build_module(stock, config=config, layer_number=1, pg_collection=groups)
        positions.load_state_dict(tokenized.state_dict(), strict=False)
        table = torch.randn(vocab, args.hidden, generator=torch.Generator().manual_seed(1)).to(args.device, dtype)
        return cls(*(x.to(args.device, dtype) for x in (tokenized, positions)), table)


@dataclass
class Timing:
    """Wall seconds of one way, round by round."""

    forward: list[float]
    backward: list[float]

    def medians(self) -> tuple[float, float]:
        """Of forward and backward, in milliseconds."""
        return 1e3 * statistics.median(self.forward), 1e3 * statistics.median(self.backward)


def timed(work: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result and the wall seconds of `work`, to the end of the device's part."""
    started = time.perf_counter()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def compare(layers: Layers, tokens: Tensor, args: argparse.Namespace) -> tuple[dict[str, Timing], float, float]:
    """Timings by name ("tokenized", "plan", peers); L/U; the largest difference of outputs relative to the largest output."""
    batch, length = tokens.shape
    lengths = torch.full((batch,), length, dtype=torch.int64, device=args.device)
    generator = torch.Generator(args.device).manual_seed(2)
    grad = torch.randn(length, batch, args.hidden, generator=generator, device=args.device).to(layers.table.dtype)
    attentions = peers(args.device)
    timings = {name: Timing([], []) for name in ("tokenized", "plan", *attentions)}
    out: dict[str, Tensor] = {}
    space = layout_of(plan_microbatch(tokens, lengths)).space

    def on_rows() -> Tensor:
        plan, seconds = timed(lambda: plan_microbatch(tokens, lengths), args.device)
        timings["plan"].forward.append(seconds)
        timings["plan"].backward.append(0.0)
        rows = layers.table[layout_of(plan).tokens()].unsqueeze(1).requires_grad_()
        return layers.tokenized(hidden_states=rows, attention_mask=None, packed_seq_params=plan)[0]

    def on_positions() -> Tensor:
        hidden = layers.table[tokens.t()].requires_grad_()
        return layers.positions(hidden_states=hidden, attention_mask=None)[0]

    def one(name: str, keep: bool) -> None:
        if name in attentions:
            layers.positions.self_attention.core_attention.attend = attentions[name]
        result, forward = timed(on_rows if name == "tokenized" else on_positions, args.device)
        weigh = grad.reshape(-1, 1, args.hidden)[: result.shape[0]] if name == "tokenized" else grad
        _, backward = timed(lambda: result.backward(weigh), args.device)
        if keep:
            timings[name].forward.append(forward)
            timings[name].backward.append(backward)
        out[name] = result.detach()

    for name in ("tokenized", *attentions):
        try:
            for _ in range(2):
                one(name, keep=False)
        except Exception as error:
            if name == "tokenized":
                raise
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            print(f"{name} does not run here: {reason}", file=sys.stderr, flush=True)  # not between the table's rows
            del timings[name]
    timings["plan"] = Timing([], [])
    names = [name for name in timings if name != "plan"]
    for _ in range(args.rounds):
        for name in names:
            one(name, keep=True)
    peer = next(name for name in names if name != "tokenized")
    expanded = space.expand(out["tokenized"][: space.num_rows, 0]).transpose(0, 1)
    difference = (expanded.float() - out[peer].float()).abs().max() / out[peer].float().abs().max()
    return timings, tokens.numel() / space.num_rows, float(difference)


def text_tokens(paths: Sequence[Path], vocab: int, length: int, batch: int) -> Tensor:
    """(B, L) int64 from the texts of `paths` one after another, by a byte-pair tokenizer trained on them."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    texts = [path.read_text(errors="ignore") for path in paths]
    tokenizer.train_from_iterator(texts, vocab_size=vocab, show_progress=False)
    ids = [i for text in texts for i in tokenizer.encode(text).ids]
    if len(ids) < batch * length:
        raise ValueError(f"the texts hold {len(ids)} tokens; batch x length asks for {batch * length}")
    return torch.tensor(ids[: batch * length]).view(batch, length)


def item_tokens(length: int, batch: int, exponent: float = 1.05, items: int = 50_000_000) -> Tensor:
    """(B, L) int64 by Zipf's law, drawn by inverting its continuous form."""
    u = torch.rand(batch, length, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    power = 1.0 - exponent
    return (1.0 + u * (items**power - 1.0)).pow(1.0 / power).long()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32768, help="of the byte-pair tokenizers")
    parser.add_argument("--text-length", type=int, default=32768)
    parser.add_argument("--item-length", type=int, default=4096)
    parser.add_argument("--item-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    english = [stdlib / "pydoc_data" / "topics.py"]
    cases = {
        "English": lambda: text_tokens(english, args.vocab, args.text_length, 1),
        "Python": lambda: text_tokens(sorted(stdlib.glob("*.py"))[:60], args.vocab, args.text_length, 1),
        "Zipf items": lambda: item_tokens(args.item_length, args.item_batch),
    }
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if args.device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    if args.device != "cpu":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
    layer = f"hidden {args.hidden}, {args.heads} heads; ms forward / backward, plan within tokenized forward; over the fastest peer"
    print(conditions(torch.device(args.device), layer, packages=("megatron-core", "flash-attn-4")))
    names = list(peers(args.device))
    table = Table(
        ["data", "B x L", "L/U", "plan", "tokenized", *names, "times faster forward / backward / both", "difference"]
    )
    for name, draw in cases.items():
        tokens = draw()
        batch, length = tokens.shape
        distinct, tokens = tokens.unique(return_inverse=True)  # ids in order: the table needs only rows that occur
        timings, ratio, difference = compare(Layers.of(args, distinct.numel()), tokens.to(args.device), args)
        figures = {key: timing.medians() for key, timing in timings.items()}
        ours, *theirs = (figures[key] for key in figures if key != "plan")
        best = min(theirs, key=sum)
        times = [f"{best[0] / ours[0]:.1f}", f"{best[1] / ours[1]:.1f}", f"{sum(best) / sum(ours):.1f}"]
        cells = [
            f"{ms[0]:.2f} / {ms[1]:.2f}" if ms else "did not run" for ms in map(figures.get, ["tokenized", *names])
        ]
        plan = f"{figures['plan'][0]:.2f}"
        table.row(name, f"{batch} x {length}", f"{ratio:.1f}", plan, *cells, " / ".join(times), f"{difference:.1e}")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
