"""Positional attention as Hugging Face ``transformers`` computes it: its own modules with random weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from translution.conformance.reductions import Draw, Peer, Reduction, ReductionCase, Weights, walk
from translution.spec import Lattice, Operator
from translution.spec.presets import alibi_attention, rope_attention, swin_attention, t5_attention

# All of them take the softmax in float32, whatever the dtype of their inputs.
PEER_ARITHMETIC = "float32"


def _case(
    draw: Draw,
    operator: Operator,
    module: nn.Module,
    call: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]],
    relay: Callable[[Weights], dict[str, Tensor]],
    note: str,
) -> ReductionCase:
    module = module.to(torch.float64).eval()
    config: Any = getattr(module, "config", None)
    if config is not None:
        config._attn_implementation = "eager"

    def forward(weights: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        arguments, options = call(x)
        result: Tensor = torch.func.functional_call(module, dict(weights), arguments, options)[0]
        return result

    return draw.case(operator, Peer(draw.weights(module), forward, relay, PEER_ARITHMETIC), alone=True, note=note)


def _projections(weights: Weights, names: dict[str, str], bias: Sequence[str] = ()) -> dict[str, Tensor]:
    found = {f"{role}.weight": weights[f"{name}.weight"].T for role, name in names.items()}
    return found | {f"{role}.bias": weights[f"{names[role]}.bias"] for role in bias}


def _causal_mask(length: int) -> Tensor:
    return torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(
        torch.ones(length, length).triu(1).bool(), -torch.inf
    )


def _llama(draw: Draw, seed: int) -> ReductionCase:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    causal, bias, grouped = (bool(digit) for digit in walk(seed, 2, 2, 2))
    length, each, base = draw.pick((1, 5, 9)), draw.pick((2, 4, 8)), float(draw.pick((100, 10000)))
    heads = 2 * draw.pick((1, 2))
    shared = 2 if grouped else 1
    dim = heads * draw.pick((1, 2))
    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=heads, num_key_value_heads=heads // shared, head_dim=each,
        attention_bias=bias, rope_parameters={"rope_type": "default", "rope_theta": base},
    )  # fmt: skip
    operator = rope_attention(
        (length,), dim, heads, base=base, head_dim=each, causal=causal, qkv_bias=bias, output_bias=bias
    )
    position = LlamaRotaryEmbedding(config)
    mask = _causal_mask(length) if causal else None

    def call(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (x, position(x, torch.arange(length)[None]), mask), {}

    def relay(weights: Weights) -> dict[str, Tensor]:
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
        found = _projections(weights, names, tuple(names) if bias else ())
        for name in found:
            if name.startswith(("key", "value")):
                own = found[name].reshape(*found[name].shape[:-1], heads // shared, each)
                found[name] = own.repeat_interleave(shared, -2).flatten(-2)
        return found

    note = f"{length=}, {heads} heads of {each} with {heads // shared} keys, {base=}, {causal=}, {bias=}"
    return _case(draw, operator, LlamaAttention(config, layer_idx=0), call, relay, note)


def _swin(draw: Draw, seed: int) -> ReductionCase:
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinAttention

    (bias,) = walk(seed, 2)
    side, heads = draw.pick((1, 2, 3)), draw.pick((1, 2, 3))
    width = heads * draw.pick((2, 4))
    config = SwinConfig(qkv_bias=bool(bias))

    def relay(weights: Weights) -> dict[str, Tensor]:
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
        found = _projections(weights, names, tuple(names) if bias else ("output",))
        return found | {"relevance.bias": weights["relative_position_bias.relative_position_bias_table"].T}

    return _case(
        draw,
        swin_attention((side, side), width, heads, qkv_bias=bool(bias)),
        SwinAttention(config, width, heads, side),
        lambda x: ((x,), {}),
        relay,
        f"window {side} x {side}, {heads} heads of {width // heads}, bias {bool(bias)}",
    )


def _t5(draw: Draw, seed: int) -> ReductionCase:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    (causal,) = (bool(digit) for digit in walk(seed, 2))
    buckets, distance = ((6, 20), (8, 19))[draw.pick((0, 1))] if causal else ((8, 16), (12, 20))[draw.pick((0, 1))]
    length, heads, each, dim = draw.pick((1, 7, 13)), draw.pick((1, 2)), draw.pick((2, 3)), draw.pick((3, 4))
    config = T5Config(
        d_model=dim, d_kv=each, num_heads=heads, is_decoder=causal, dropout_rate=0.0,
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance,
    )  # fmt: skip
    operator = t5_attention(
        (length,), dim, heads, head_dim=each, num_buckets=buckets, max_distance=distance, causal=causal
    )
    module = T5Attention(config, has_relative_attention_bias=True, layer_idx=0, is_causal=causal)
    layout = operator.layout
    assert isinstance(layout, Lattice)
    # A key before its query has a bucket of its own number, a later one half the buckets more.
    signed = [label[0] for label in layout.labels() if isinstance(label, tuple)]
    rows = [label if label >= 0 else buckets // 2 - label for label in signed]
    mask = _causal_mask(length) if causal else None

    def relay(weights: Weights) -> dict[str, Tensor]:
        found = _projections(weights, {"query": "q", "key": "k", "value": "v", "output": "o"})
        return found | {"relevance.bias": weights["relative_attention_bias.weight"][rows].T}

    note = f"{length=}, {buckets} buckets up to {distance}, {causal=}, {heads} heads of {each}"
    return _case(draw, operator, module, lambda x: ((x, mask), {}), relay, note)


def _bloom(draw: Draw, seed: int) -> ReductionCase:
    from transformers import BloomConfig
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    heads = (1, 2, 3, 4, 6)[seed % 5]
    length, width = draw.pick((1, 5, 9)), heads * draw.pick((2, 3))
    config = BloomConfig(hidden_size=width, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0)
    operator = alibi_attention((length,), width, heads, qkv_bias=True)
    mask = _causal_mask(length)

    def call(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        alibi = build_alibi_tensor(torch.ones(len(x), length, dtype=torch.long), heads, torch.float64)
        return (x, torch.zeros_like(x), alibi, mask), {}

    def relay(weights: Weights) -> dict[str, Tensor]:
        found = {"output.weight": weights["dense.weight"].T, "output.bias": weights["dense.bias"]}
        for number, role in enumerate(("query", "key", "value")):
            for name, joined in (("weight", "query_key_value.weight"), ("bias", "query_key_value.bias")):
                own = weights[joined]
                part = own.reshape(heads, 3, width // heads, *own.shape[1:])[:, number].flatten(0, 1)
                found[f"{role}.{name}"] = part.T if name == "weight" else part
        return found

    note = f"{length=}, {heads} heads of {width // heads}"
    return _case(draw, operator, BloomAttention(config, layer_idx=0), call, relay, note)


TRANSFORMERS = (
    Reduction(
        "rope-1d",
        "RoPE 1-D, grouped heads",
        "transformers LlamaAttention (softmax in float32)",
        ("E10", "L4"),
        _llama,
        ("sdpa",),
    ),
    Reduction(
        "swin", "Swin relative bias", "transformers SwinAttention (softmax in float32)", ("R5", "L3"), _swin, ("sdpa",)
    ),
    Reduction(
        "t5",
        "T5 bucketed bias, both directions",
        "transformers T5Attention (softmax in float32)",
        ("R5", "L7", "L4"),
        _t5,
        ("sdpa",),
    ),
    Reduction("alibi", "ALiBi", "transformers BloomAttention (softmax in float32)", ("R5", "L4"), _bloom, ("sdpa",)),
)
