"""What tests share: a tiny model that vLLM really loads, and the benchmark of 393 real prompts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SHARED_PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "hallu-sec-benchmark.json"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "Does CVE-2021-44228 exist in the National Vulnerability Database? Please confirm the identifier.",
    "Summarize the vulnerability that affects the Apache HTTP Server and explain its severity.",
    "Yes, the identifier is valid: it describes remote code execution in a logging library.",
    "I could not find any record of this vulnerability, so I cannot describe how it is exploited.",
    "Which products and versions are affected, and which patch or mitigation does the vendor recommend?",
]
VOCABULARY = 448
CONTEXT = 512


@pytest.fixture(scope="session")
def shared_prompts() -> Path:
    """The prompts file of the legacy project: 393 prompts."""
    if not SHARED_PROMPTS.exists():
        pytest.skip(f"{SHARED_PROMPTS} is not here")
    return SHARED_PROMPTS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama in float32 with a real tokenizer: 448 tokens, a context of 512.

    The same weights every time. Its logits lie far apart, so that rounding never decides which
    token is best, and it answers with endless nonsense.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make setup")
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    save_tokenizer(folder)
    save_weights(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def save_weights(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        # Wide enough that the context, not only the last token, decides what comes next.
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    model.save_pretrained(folder)
