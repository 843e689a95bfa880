"""The one forward of both stages: every kind of row, adapter, precision and checkpointing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import peft
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.errors import UserError
from mrpo.model.load import Attention, set_attention
from mrpo.model.logps import SequenceLogps, split_by_sequence, sum_by_sequence
from mrpo.model.packing import Batch, pack, unpacked

Lm = Callable[..., nn.Module]


def one_at_a_time(lm: nn.Module, prompts: list[RenderedPrompt]) -> Tensor:
    """Token log-probs [R] through transformers' own forward, eager and one sequence a batch."""
    lm.set_attn_implementation("eager")
    logps = []
    for prompt in prompts:
        for sequence in prompt.responses:
            ids = torch.tensor([sequence.token_ids])
            with torch.no_grad():
                table = lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            picks = ids[0, sequence.start :, None]
            logps.append(table[sequence.start - 1 : -1].gather(1, picks)[:, 0])
    return torch.cat(logps)


def test_padded_rows_equal_packed_rows(tiny_lm: Lm, prompts: list[RenderedPrompt]) -> None:
    expected = one_at_a_time(tiny_lm("mistral", sliding_window=4), prompts)
    logps = SequenceLogps(tiny_lm("mistral", sliding_window=4))
    with torch.no_grad():
        assert torch.allclose(logps(pack(prompts)), expected, atol=1e-5)
        assert torch.allclose(logps(unpacked(prompts)), expected, atol=1e-5)


def test_what_a_tool_says_within_a_response_is_read_and_not_scored(
    tiny_lm: Lm, prompts: list[RenderedPrompt]
) -> None:
    def with_tool(sequence: RenderedSequence) -> RenderedSequence:
        begin, end = sequence.start + 1, len(sequence.token_ids) - 1
        return replace(sequence, context=((begin, end),)) if begin < end else sequence

    tools = [
        replace(prompt, responses=tuple(map(with_tool, prompt.responses))) for prompt in prompts
    ]
    kept = []
    for prompt in tools:
        for sequence in prompt.responses:
            length = len(sequence.token_ids) - sequence.start
            kept += [i in (0, length - 1) for i in range(length)]
    assert 0 < sum(kept) < len(kept)
    expected = one_at_a_time(tiny_lm("llama"), prompts)[torch.tensor(kept)]
    logps = SequenceLogps(tiny_lm("llama"))
    with torch.no_grad():
        assert torch.allclose(logps(pack(tools)), expected, atol=1e-5)
        assert torch.allclose(logps(unpacked(tools)), expected, atol=1e-5)


def by_prompt(sums: Tensor, prompts: list[RenderedPrompt]) -> tuple[Tensor, ...]:
    """[S] of all sequences -> those of each prompt's responses."""
    return sums.split([len(prompt.responses) for prompt in prompts])


def test_scores_do_not_depend_on_neighbours(tiny_lm: Lm, prompts: list[RenderedPrompt]) -> None:
    logps = SequenceLogps(tiny_lm("llama"))
    with torch.no_grad():
        together = by_prompt(sum_by_sequence(logps(pack(prompts)), pack(prompts)), prompts)
        order = list(range(len(prompts)))
        random.Random(1).shuffle(order)
        mixed = [prompts[index] for index in order]
        batch = pack(mixed)
        shuffled = by_prompt(sum_by_sequence(logps(batch), batch), mixed)
        alone = [sum_by_sequence(logps(pack([prompt])), pack([prompt])) for prompt in prompts]
    for place, index in enumerate(order):
        assert torch.allclose(shuffled[place], together[index], atol=1e-4)
        assert torch.allclose(alone[index], together[index], atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("bloom", {"n_head": 4}),  # ALiBi
        ("mamba", {"state_size": 4}),  # state spaces
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # attention sinks
        ("qwen3_5_text", {"num_hidden_layers": 4}),  # linear attention
    ],
)
def test_other_architectures_run_one_response_a_row_and_say_so(
    model_type: str,
    changes: dict[str, int],
    tiny_lm: Lm,
    prompts: list[RenderedPrompt],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = one_at_a_time(tiny_lm(model_type, **changes), prompts)
    logps = SequenceLogps(tiny_lm(model_type, **changes))
    assert not logps.packs
    assert f"{model_type} is not on the list to pack" in caplog.text
    with torch.no_grad():
        for row in logps.plan(prompts, 200):
            batch = logps.collate([prompts[index] for index in row], "cpu")
            assert batch.bounds is None
            parts = split_by_sequence(logps(batch), batch)
            separate = split_by_sequence(expected, unpacked(prompts))
            numbers = by_prompt(torch.arange(len(separate)), prompts)
            wanted = [number for index in row for number in numbers[index].tolist()]
            for ours, number in zip(parts, wanted, strict=True):
                assert torch.allclose(ours, separate[number], atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("hyperclovax", {"logits_scaling": 3.0}),  # multiplies where Granite divides
        ("recurrent_gemma", {"logits_soft_cap": 1.0, "lru_width": 32}),
        ("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4}),
    ],
)
def test_head_that_is_not_understood_is_refused(
    model_type: str, changes: dict[str, object], tiny_lm: Lm, prompts: list[RenderedPrompt]
) -> None:
    logps = SequenceLogps(tiny_lm(model_type, **changes))
    with pytest.raises(UserError, match=f"{model_type} changes its logits"):
        logps(logps.collate(prompts, "cpu"))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 40, 70, 1000])
def test_parts_hold_every_response_once_and_are_as_long_as_the_budget_allows(
    tiny_lm: Lm, prompts: list[RenderedPrompt], max_tokens: int, packs: bool
) -> None:
    logps = SequenceLogps(tiny_lm("llama"))
    logps.packs = packs
    for prompt in prompts:
        parts = logps.parts(prompt, max_tokens)
        assert [n for part in parts for n in part] == list(range(len(prompt.responses)))
        for part in parts:
            computed = logps.collate([prompt.only(part)], "cpu").num_tokens
            assert computed == logps.tokens(prompt.only(part))
            assert len(part) == 1 or computed <= max_tokens
        for part, following in pairwise(parts):
            longer = prompt.only([*part, following[0]])
            assert logps.tokens(longer) > max_tokens


LONGROPE = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
DYNAMIC = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize(("model_type", "changes"), [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_frequencies_that_depend_on_length_are_those_of_each_sequence(
    model_type: str, changes: dict[str, object], tiny_lm: Lm, prompts: list[RenderedPrompt]
) -> None:
    logps = SequenceLogps(tiny_lm(model_type, **changes))
    assert logps.rope_limit == 16
    sums_alone = []
    for prompt in prompts:
        # A fresh model each time: transformers' own remembers the longest sequence it has seen.
        for branch in prompt.responses:
            alone = one_at_a_time(tiny_lm(model_type, **changes), [RenderedPrompt((branch,), 1)])
            sums_alone.append(alone.sum())
    lengths = [len(s.token_ids) for prompt in prompts for s in prompt.responses]
    assert min(lengths) <= 16 < max(lengths)
    rows = logps.plan(prompts, 120)
    assert sorted(index for row in rows for index in row) == list(range(len(prompts)))
    with torch.no_grad():
        for row in rows:
            batch = logps.collate([prompts[index] for index in row], "cpu")
            sums = sum_by_sequence(logps(batch), batch)
            all_alone = by_prompt(torch.stack(sums_alone), prompts)
            expected = torch.cat([all_alone[index] for index in row])
            assert torch.allclose(sums, expected.double(), atol=1e-4)


def test_sums_are_those_of_the_parts(tiny_lm: Lm, prompts: list[RenderedPrompt]) -> None:
    logps, batch = SequenceLogps(tiny_lm("llama")), pack(prompts)
    with torch.no_grad():
        values = logps(batch)
    sums = sum_by_sequence(values, batch)
    assert sums.dtype == torch.float64
    parts = split_by_sequence(values, batch)
    sequences = [sequence for prompt in prompts for sequence in prompt.responses]
    for number, (part, sequence) in enumerate(zip(parts, sequences, strict=True)):
        assert len(part) == len(sequence.token_ids) - sequence.start
        assert sums[number].item() == pytest.approx(part.double().sum().item(), abs=1e-12)
    assert sum_by_sequence(logps(batch), batch).dtype == torch.float32


@pytest.mark.parametrize("make", [pack, unpacked])
def test_batch_of_no_prompts_has_zero_gradients(
    make: Callable[[list[RenderedPrompt]], Batch], tiny_lm: Lm
) -> None:
    logps = SequenceLogps(tiny_lm("llama"))
    batch = make([])
    values = logps(batch)
    assert values.shape == (0,)
    sum_by_sequence(values, batch).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in logps.parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_lora_policy(targets: str | list[str], tiny_lm: Lm, prompts: list[RenderedPrompt]) -> None:
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    policy = peft.get_peft_model(tiny_lm("llama"), config).eval()
    logps, batch = SequenceLogps(policy, chunk_tokens=16), pack(prompts)
    values = logps(batch)
    merged = peft.get_peft_model(tiny_lm("llama"), config)
    merged.load_state_dict(policy.state_dict())
    expected = one_at_a_time(merged.merge_and_unload(), prompts)
    assert torch.allclose(values, expected, atol=1e-4)
    values.sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_activation_checkpointing_changes_nothing(
    tiny_lm: Lm, prompts: list[RenderedPrompt]
) -> None:
    batch, gradients = pack(prompts), []
    for checkpointing in (False, True):
        lm = tiny_lm("gemma2", sliding_window=4).train()
        calls = count_calls(lm.get_decoder().layers[0].mlp)
        if checkpointing:
            lm.gradient_checkpointing_enable()
        SequenceLogps(lm)(batch).sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in lm.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def count_calls(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_bfloat16_autocast_is_near_float32(tiny_lm: Lm, prompts: list[RenderedPrompt]) -> None:
    logps, batch = SequenceLogps(tiny_lm("qwen3")), pack(prompts)
    exact = logps(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logps(batch)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.1
    rough.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in logps.parameters())


@pytest.mark.parametrize("attn", ["sdpa", "flex_attention"])
def test_compiled_layers_serve_rows_of_every_shape(
    attn: Attention, tiny_lm: Lm, prompts: list[RenderedPrompt]
) -> None:
    lm = tiny_lm("mistral", sliding_window=4, head_dim=16, num_hidden_layers=1)
    logps, compiled = SequenceLogps(lm), CompileCounter()
    shapes = [prompts[:count] for count in (6, 3, 4, 2, 5, 1)]
    with torch.no_grad():
        expected = [logps(logps.collate(some, "cpu")) for some in shapes]
        set_attention(lm, attn)
        for layer in logps.decoder_layers:
            layer.compile(dynamic=True, backend=compiled)
        graphs = []
        for some, logps_alone in zip(shapes, expected):
            assert torch.allclose(logps(logps.collate(some, "cpu")), logps_alone, atol=1e-5)
            graphs.append(compiled.frame_count)
    # The second shape shows what varies; after it nothing is compiled.
    assert 0 < graphs[0] <= graphs[1] == graphs[-1]


def test_multimodal_wrapper_scores_text_through_its_decoder(
    tiny_lm: Lm, prompts: list[RenderedPrompt]
) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = tiny_lm("gemma3_text", sliding_window=4, layer_types=["sliding_attention"] * 2)
    lm = tiny_lm(
        "gemma3",
        text_config=text.config.to_dict(),
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    logps = SequenceLogps(lm)
    assert logps.packs
    with torch.no_grad():
        values = logps(pack(prompts))
    assert torch.allclose(values, one_at_a_time(lm, prompts), atol=1e-4)


def test_replaced_neighbour_leaves_a_score_bit_for_bit(
    tiny_lm: Lm, prompts: list[RenderedPrompt]
) -> None:
    logps = SequenceLogps(tiny_lm("llama"))
    last = prompts[1].responses[-1]
    other = replace(last, token_ids=[*last.token_ids[:-1], last.token_ids[-1] ^ 1])
    changed = replace(prompts[1], responses=(*prompts[1].responses[:-1], other))
    with torch.no_grad():
        before = logps(pack(prompts[:2]))
        after = logps(pack([prompts[0], changed]))
    mine = pack(prompts[:2]).sequence < 2
    assert torch.equal(before[mine], after[mine])


def test_a_model_that_sees_later_tokens_is_refused(
    tiny_lm: Callable[..., nn.Module], prompts: list[RenderedPrompt]
) -> None:
    logps = SequenceLogps(tiny_lm("bert"))
    with pytest.raises(UserError, match="a token sees those after it"):
        logps(unpacked(prompts))
