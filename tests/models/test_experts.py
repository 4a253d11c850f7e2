"""Experts taken apart compute what transformers' fused ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from compressor.models.experts import UnfusedExperts, is_fused


def fused(experts: int, hidden: int, intermediate: int) -> MixtralExperts:
    config: Any = AutoConfig.for_model(
        "mixtral", num_local_experts=experts, hidden_size=hidden, intermediate_size=intermediate
    )
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(("experts", "k", "tokens"), [(4, 2, 17), (8, 1, 3), (3, 3, 1)])
def test_same_output(experts: int, k: int, tokens: int) -> None:
    torch.manual_seed(0)
    module = fused(experts, 16, 24)
    assert is_fused(module)
    apart = UnfusedExperts(module)
    with torch.no_grad():
        expert: Any
        for i, expert in enumerate(apart):
            gate, up = module.gate_up_proj[i].chunk(2)
            expert.gate_proj.weight.copy_(gate)
            expert.up_proj.weight.copy_(up)
            expert.down_proj.weight.copy_(module.down_proj[i])
        x = torch.randn(tokens, 16)
        chosen = torch.rand(tokens, experts).topk(k).indices
        share = torch.rand(tokens, k)
        assert torch.allclose(apart(x, chosen, share), module(x, chosen, share), atol=1e-5)
        chosen[0] = experts  # a slot marked as not to be computed
        assert torch.allclose(apart(x, chosen, share), module(x, chosen, share), atol=1e-5)
        assert not apart(x, chosen, share)[0].any()


def test_other_layouts_are_left_fused() -> None:
    """gpt-oss: transposed, interleaved, with biases."""
    config = AutoConfig.for_model(
        "gpt_oss", num_local_experts=2, hidden_size=16, intermediate_size=16, head_dim=8
    )
    assert not is_fused(GptOssExperts(config))
    assert not is_fused(torch.nn.Linear(2, 2))


def test_all_experts_of_a_model_are_found() -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=2, num_experts=4)
        model = AutoModelForCausalLM.from_config(config)
    assert sum(is_fused(module) for module in model.modules()) == 2
