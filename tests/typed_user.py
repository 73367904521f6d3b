"""What a user of the library writes, for pyright (`make lint`): calls that it must accept, and mistakes it must see.

Nothing runs this file. An ignored error that is none is an error.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true, reportAttributeAccessIssue=true

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_builders import DepthSampler, LoopCollator, load_task
from modeling_looped import LoopedConfig, LoopedForCausalLM, attach, detach, looped

ids = torch.tensor([[1, 2, 3]])
model = LoopedForCausalLM(LoopedConfig(vocab_size=100, hidden_size=64, num_attention_heads=4))
model = LoopedForCausalLM.from_pretrained("folder", num_loops=8, dtype="bfloat16")
model.forward(num_loops=8, halting={"rule": "kl", "kl_threshold": 0.1})
model.generate(ids, num_loops=8, max_new_tokens=4)
model.generate(ids, num_loops=torch.tensor([8]), do_sample=True)
model.generate(ids, halting=True)
model.generate(ids, draft_loops=2, num_loops=8)

model.generate(ids, num_loops="8")  # pyright: ignore[reportArgumentType]
model.generate(ids, halting=0.5)  # pyright: ignore[reportArgumentType]
model.generate(ids, draft_loops=torch.tensor([2]))  # pyright: ignore[reportArgumentType]
model.forward(num_loops=1.5)  # pyright: ignore[reportArgumentType]
LoopedForCausalLM.from_pretrained("folder", num_loops="8")  # pyright: ignore[reportArgumentType]

llama = LlamaForCausalLM(LlamaConfig())
with looped(llama, window=(1, 2), num_loops=3) as again:
    again.lm_head.requires_grad_(False)  # it is still a Llama
attach(llama, method="naive").lm_head.requires_grad_(False)
detach(llama).lm_head.requires_grad_(False)
looped(llama, method="newton")  # pyright: ignore[reportArgumentType]
attach(llama, loops=3)  # pyright: ignore[reportCallIssue]

LoopCollator(DepthSampler(kind="uniform", minimum=1, maximum=8, seed=0))
load_task("khop", "cpu", seed=1)
LoopCollator("uniform")  # pyright: ignore[reportArgumentType]
