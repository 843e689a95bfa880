"""One of two processes of `test_sharding.py`: a sharded forward and backward, against a whole one.

Rank 0 holds all the prompts and rank 1 none, so that an empty batch takes part too. FSDP2 averages
gradients over the ranks.
"""

from __future__ import annotations

import random

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mrpo.data.rendering import RenderedPrompt, RenderedSequence
from mrpo.demo.models import build_model
from mrpo.model.logps import SequenceLogps, sum_by_sequence


def random_prompts() -> list[RenderedPrompt]:
    rng = random.Random(0)
    prompts = []
    for _ in range(4):
        prompt = [rng.randrange(50) for _ in range(5)]
        ids = [prompt + [rng.randrange(50) for _ in range(rng.randrange(1, 9))] for _ in range(2)]
        prompts.append(RenderedPrompt(tuple(RenderedSequence(i, 5, len(i), False) for i in ids), 5))
    return prompts


def main() -> None:
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    prompts = random_prompts() if mesh.get_rank() == 0 else []
    for precision, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        whole = SequenceLogps(build_model("qwen", 50))  # its head is tied to the embedding
        batch = whole.collate(random_prompts(), "cpu")
        sum_by_sequence(whole(batch), batch).sum().backward()
        sharded = SequenceLogps(build_model("qwen", 50))
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
        for layer in sharded.decoder_layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(sharded, mesh=mesh, mp_policy=policy)
        batch = sharded.collate(prompts, "cpu")
        sum_by_sequence(sharded(batch), batch).sum().backward()
        expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for name, parameter in sharded.named_parameters():
            gradient = 2 * parameter.grad.full_tensor()
            distance = (gradient - expected[name]).norm()
            assert distance <= tolerance * expected[name].norm(), (precision, name)
    destroy_process_group()


if __name__ == "__main__":
    main()
