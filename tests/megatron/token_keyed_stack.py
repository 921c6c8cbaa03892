"""GPTModels with token-keyed layers in one layout of ranks; every function here runs on each rank of a pool."""

from __future__ import annotations

from typing import Any

import torch
from dense_model import weight
from layouts import Layout, config_of, megatron
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from ta_plugin.megatron import get_token_keyed_block_spec, get_token_keyed_layer_spec, plan_causal

VOCAB, LENGTH = 24, 20


def batch() -> tuple[Tensor, Tensor]:
    """tokens and labels (2, LENGTH), with repeats."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB // 2, (2, LENGTH), generator=g)
    return tokens, torch.randint(0, VOCAB, (2, LENGTH), generator=g)


def config(layout: Layout, **changes: Any) -> Any:
    wide = {"params_dtype": torch.float64, "pipeline_dtype": torch.float64, "variable_seq_lengths": False}
    return config_of(layout, **(wide | changes))


@torch.no_grad()
def fill(module: torch.nn.Module, parts: int) -> None:
    """This rank's part of the weights that every layout starts from; decays stay as ALiBi's."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in module.named_parameters():
        if name.endswith("log_decay"):
            continue
        shape = list(parameter.shape)
        sharded = getattr(parameter, "tensor_model_parallel", False) and parts > 1
        if sharded:
            shape[parameter.partition_dim] *= parts
        whole = weight("layernorm." + name if "norm" in name else name, tuple(shape)).double()
        parameter.copy_(whole.chunk(parts, parameter.partition_dim)[rank] if sharded else whole)


def model_of(layout: Layout, every: int, window: tuple[int, int] | None = None, **options: Any) -> GPTModel:
    made = config(layout, window_size=window, num_layers=4)
    model = GPTModel(
        made,
        get_token_keyed_block_spec(made, VOCAB, every=every, use_transformer_engine=False, **options),
        VOCAB,
        LENGTH,
        position_embedding_type="rope",
    )
    return model.cuda()  # the CPU stand-in leaves it where it is


def losses_and_gradients(layout: Layout, every: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (2, LENGTH) of a GPTModel, and the gradients of their mean, whole: gathered over tensor parallelism."""
    with megatron(layout) as groups:
        model = model_of(layout, every, use_sdpa=layout.cp > 1)  # Megatron's local layers know no context parallelism
        fill(model, layout.tp)
        positions = torch.arange(LENGTH).expand(2, -1)
        age = positions[0][:, None] - positions[0]
        mask = dealt(((age < 0) | (age > 5))[None], layout.cp)[
            None
        ]  # Megatron would make it on "cuda", in recomputation too
        tokens, labels, positions = (dealt(x, layout.cp) for x in (*batch(), positions))
        plan = plan_causal(tokens, model.config, chunk=8 // layout.cp)
        losses = model(tokens, positions, mask, labels=labels, packed_seq_params=plan)
        (losses.sum() / (2 * LENGTH)).backward()
        whole = {}
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            if getattr(parameter, "tensor_model_parallel", False) and layout.tp > 1:
                pieces = [torch.empty_like(gradient) for _ in range(layout.tp)]
                torch.distributed.all_gather(pieces, gradient.contiguous(), group=groups.tp)
                gradient = torch.cat(pieces, parameter.partition_dim)
            elif getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(gradient, group=groups.tp)
            if layout.cp > 1:
                torch.distributed.all_reduce(gradient, group=groups.cp)
            whole[name] = gradient
        return dealt(losses.detach(), layout.cp, groups.cp), whole


def dealt(whole: Tensor, parts: int, back: Any = None) -> Tensor:
    """This context-parallel rank's positions of (B, L, ...), zigzag; with a group `back`, the whole from every rank's."""
    if parts == 1:
        return whole
    if back is None:
        rank = parallel_state.get_context_parallel_rank()
        pieces = whole.chunk(2 * parts, 1)
        return torch.cat([pieces[rank], pieces[2 * parts - 1 - rank]], 1)
    gathered = [torch.empty_like(whole) for _ in range(parts)]
    torch.distributed.all_gather(gathered, whole.contiguous(), group=back)
    first, second = zip(*(x.chunk(2, 1) for x in gathered), strict=True)
    return torch.cat([*first, *reversed(second)], 1)


def attention_over_context() -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients of attention modules over two context-parallel ranks, and of the same modules over whole rows."""
    found: list[list[Tensor]] = []
    for layout in (Layout(), Layout(cp=2)):
        with megatron(layout) as groups:
            cases = [
                _attend_dealt(layout, groups, decay, packed)
                for decay in ("none", "learned")
                for packed in (False, True)
            ]
        found.append([x for case in cases for x in case])
    return list(zip(found[1], found[0], strict=True))


def _attend_dealt(layout: Layout, groups: Any, decay: str, packed: bool) -> list[Tensor]:
    made = config(layout)
    spec = get_token_keyed_layer_spec(made, VOCAB, use_transformer_engine=False, token_dim=12, decay=decay)
    module = build_module(spec.submodules.self_attention, config=made, layer_number=1).cuda()
    fill(module, 1)
    tokens, _ = batch()
    where: dict[str, Tensor] = {"lengths": torch.tensor([LENGTH, 13])}
    if packed:
        tokens, where = tokens[:1], {"cu_seqlens": torch.tensor([0, 6, 6, 19, LENGTH])}
    g = torch.Generator().manual_seed(1)
    shape = (tokens.shape[0], LENGTH, made.hidden_size)
    hidden, weights = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    tokens, hidden, weights = (dealt(x, layout.cp) for x in (tokens, hidden, weights))
    hidden.requires_grad_()
    plan = plan_causal(tokens, made, chunk=4, **where)
    out = module(hidden.transpose(0, 1), None, packed_seq_params=plan)[0].transpose(0, 1)
    parameters = [x for name, x in module.named_parameters() if "linear_proj.bias" not in name]
    own, *shared = torch.autograd.grad((out * weights).sum(), [hidden, *parameters])
    if layout.cp > 1:
        for gradient in shared:
            torch.distributed.all_reduce(gradient, group=groups.cp)
    return [dealt(x, layout.cp, groups.cp) for x in (out.detach(), own)] + shared


def what_plans_refuse() -> list[str]:
    """Messages on this rank of two context-parallel ones when rank 1's plan is wrong, and when a plan is of another size."""
    messages = []
    with megatron(Layout(cp=2)):
        made = config(Layout(cp=2))
        tokens = dealt(batch()[0], 2)
        odd = tokens[:, :9]
        second = parallel_state.get_context_parallel_rank() == 1
        for wrong in (
            {"tokens": odd},
            {"lengths": torch.tensor([3, LENGTH + 1])},
            {"cu_seqlens": torch.tensor([0, LENGTH])},
            {"tokens": tokens[:1], "cu_seqlens": torch.tensor([0, 5])},
            {"chunk": 0},
        ):
            arguments: dict[str, Any] = {"tokens": tokens} | (wrong if second else {})
            try:
                plan_causal(config=made, **arguments)
            except ValueError as error:
                messages.append(str(error))
        spec = get_token_keyed_layer_spec(made, VOCAB, use_transformer_engine=False)
        module = build_module(spec.submodules.self_attention, config=made, layer_number=1).cuda()
        alone = plan_causal(tokens, config(Layout()))
        try:
            module(torch.zeros(LENGTH // 2, 2, made.hidden_size, dtype=torch.float64), None, packed_seq_params=alone)
        except ValueError as error:
            messages.append(str(error))
    return messages


def changed_by_the_future(every: int, decay: str) -> Tensor:
    """Logits (2, LENGTH, VOCAB) before and after the last 7 tokens change, their difference."""
    with megatron(Layout()):
        model = model_of(Layout(), every, (5, 0), decay=decay)
        fill(model, 1)
        tokens, _ = batch()
        other = tokens.clone()
        other[:, -7:] = (other[:, -7:] + 5) % VOCAB
        positions = torch.arange(LENGTH).expand(2, -1)
        with torch.no_grad():
            a, b = (
                model(x, positions, None, packed_seq_params=plan_causal(x, model.config, chunk=3))
                for x in (tokens, other)
            )
        return (a - b).abs().amax(-1)


def attention_against_formula(decay: str, packed: bool) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients of one attention module, and what attention over all positions gives for its weights."""
    with megatron(Layout()):
        made = config(Layout())
        spec = get_token_keyed_layer_spec(made, VOCAB, use_transformer_engine=False, token_dim=12, decay=decay)
        module = build_module(spec.submodules.self_attention, config=made, layer_number=1).cuda()
        fill(module, 1)
        tokens, _ = batch()
        lengths = torch.tensor([LENGTH, 13])
        bounds = torch.tensor([0, 6, 6, 19, LENGTH])
        if packed:
            tokens, plan = tokens[:1], plan_causal(tokens[:1], made, cu_seqlens=bounds, chunk=4)
        else:
            plan = plan_causal(tokens, made, lengths=lengths, chunk=4)
        shape = (LENGTH, tokens.shape[0], made.hidden_size)
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        out, bias = module(hidden, None, packed_seq_params=plan)
        samples = torch.repeat_interleave(bounds.diff())[None] if packed else torch.zeros(2, LENGTH)
        place = torch.arange(LENGTH)
        seen = (place[:, None] >= place) & (samples[:, :, None] == samples[:, None])
        q = module.linear_q(hidden)[0].view(*shape[:2], 4, 8).transpose(0, 1)
        rows = module.norm(module.table(tokens))
        k, v = (
            x(rows)[0].view(*tokens.shape, 2, 8).repeat_interleave(2, 2) for x in (module.linear_k, module.linear_v)
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
        if decay != "none":
            scores = scores - module.decay().double()[:, None, None] * (place[:, None] - place)
        share = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->ibhd", share, v).flatten(2)
        if not packed:
            mixed = mixed * (place[:, None] < lengths)[..., None]
        expected = module.linear_proj(mixed)[0]
        inputs = [hidden, *module.parameters()]
        pairs = [(out.detach(), expected.detach())]
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for got, want in zip(
            *(torch.autograd.grad((x * weights).sum(), inputs, allow_unused=True) for x in (out, expected)), strict=True
        ):
            assert (got is None) == (want is None)
            if got is not None:
                pairs.append((got, want))
        assert bias is module.linear_proj.bias
        return pairs
