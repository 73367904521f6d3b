"""Load and run saved models in vLLM: test_vllm.py starts this in vLLM's environment, without this project's packages.

It reads a case per line, {"folder", "num_loops", "eager", "prompts", "new_tokens"}, and answers with a line: the
{"tokens"} of greedy decoding, or {"refused"} with the error.
"""

import json
import os
import sys

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def answer(case: dict) -> dict:
    try:
        llm = LLM(
            case["folder"],
            trust_remote_code=True,
            dtype="float32",
            enforce_eager=case["eager"],
            max_model_len=64,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            distributed_executor_backend="uni",
            hf_overrides={} if case["num_loops"] is None else {"num_loops": case["num_loops"]},
        )
    except Exception as error:
        return {"refused": str(error)}
    prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=case["new_tokens"], ignore_eos=True)
    tokens = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, greedy, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return {"tokens": tokens}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM prints is no answer
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)
