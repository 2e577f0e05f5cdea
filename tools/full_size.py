"""Loads a BLIP-2 of full size on this machine, and prints the memory and the time that takes.

`python -m tools.full_size FOLDER` writes a checkpoint with the architecture of blip2-opt-2.7b,
random weights in bf16 and a stand-in for the tokenizer into FOLDER (7.5 GB, once), then opens it
with `Blip2.load` in a fresh process for each precision, captions a picture and answers a question.
The texts are noise; memory and time are those of the real model. With `--write` the output also
goes into `docs/blip2.md`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tools.docs.page import machine, replace_section
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blipq_worker.blip2 import Blip2, GenerateItem
from blipq_worker.catalog.params import resolve
from blipq_worker.catalog.prompts import vqa_prompt
from blipq_worker.process.malloc import give_large_blocks_back
from blipq_worker.serving.footprint import GIB, config_of

PAGE = Path("docs/blip2.md")
PUBLISHED = "Salesforce/blip2-opt-2.7b"
SHARD_BYTES = 2 * GIB
#: Peak memory of the whole process, in GiB.
LIMITS = {"bf16": 10.0, "nf4": 6.0}
QUANTIZATION = {"bf16": "none", "nf4": "nf4"}
IMAGE_TOKEN, LINE_END, TOKENS = 50265, 50118, 50266
LONGEST = 10


# --- the checkpoint -------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> None:
    """Random weights of the published architecture, shard by shard, with a processor."""
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config()
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config).to(torch.bfloat16)
    shards = list(_shards(model))
    where, total = {}, 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        weights = {name: _random(name, model.get_parameter(name), generator) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        total += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.save_pretrained(folder)
    image_processor = BlipImageProcessorPil(size={"height": 224, "width": 224})
    Blip2Processor(image_processor, tokenizer(), num_query_tokens=32).save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def published_config() -> Blip2Config:
    """The configuration of the published checkpoint, with its special tokens."""
    config = config_of(PUBLISHED)
    config.image_token_index = IMAGE_TOKEN
    config.text_config.eos_token_id = LINE_END
    config.text_config.bos_token_id, config.text_config.pad_token_id = 2, 1
    return config


def _shards(model: Blip2ForConditionalGeneration) -> Iterator[list[str]]:
    """Names of the weights, in shards of at most SHARD_BYTES; tied ones once."""
    names: list[str] = []
    size = 0
    for name, weight in model.named_parameters():
        if names and size + weight.nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += weight.nbytes
    yield names


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As models are initialized, with larger queries, so that pictures make a difference."""
    weight = torch.empty(like.shape, dtype=torch.bfloat16)
    if name.endswith("bias"):
        return weight.zero_()
    if "norm" in name:
        return weight.fill_(1.0)
    return weight.normal_(std=0.5 if name == "query_tokens" else 0.02, generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as OPT's, with its special ones in their places; most are made-up words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(["<s>", "<pad>", "</s>", "<unk>"])}
    vocabulary[_line_end()] = LINE_END
    for token in alphabet:
        vocabulary.setdefault(token, len(vocabulary) - 1)
    taken = set(vocabulary.values())
    vocabulary |= {f"Ġword{id}": id for id in range(IMAGE_TOKEN) if id not in taken}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def _line_end() -> str:
    """A line feed as byte-level tokenizers spell it."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]


# --- one precision, in a process of its own -------------------------------------------------------


def measure(folder: Path, precision: str) -> None:
    """Loads, captions, answers; prints a row of the table."""
    give_large_blocks_back()  # as a worker does
    imported = peak()
    started = time.monotonic()
    model = Blip2.load(str(folder), quantization=QUANTIZATION[precision], dtype="bfloat16")
    loaded, load_s = peak(), time.monotonic() - started
    pixels = model.preprocess(Image.linear_gradient("L").convert("RGB"))
    times = []
    for kind, prompt in (("caption", ""), ("vqa", vqa_prompt("what is this?"))):
        params = resolve(kind, model.info, {"max_new_tokens": LONGEST})
        started = time.monotonic()
        (((text,),),) = model.generate([GenerateItem(pixels, (prompt,), params)])
        times.append(time.monotonic() - started)
        assert text.text, "it wrote nothing"
    row = [f"{gib:.1f} GiB" for gib in (imported, loaded, peak())]
    row += [f"{LIMITS[precision]:.0f} GiB", f"{load_s:.0f} s", *(f"{each:.1f} s" for each in times)]
    print(f"| {precision} | {' | '.join(row)} |", flush=True)
    if peak() > LIMITS[precision]:
        raise SystemExit(f"{precision} took more memory than {LIMITS[precision]} GiB")


def peak() -> float:
    """The most memory that this process has had resident (VmHWM), in GiB."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def main() -> None:
    """Writes the checkpoint where it is missing, then measures every precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", choices=LIMITS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.precision:
        measure(arguments.folder, arguments.precision)
        return
    if not (arguments.folder / "model.safetensors.index.json").exists():
        write_checkpoint(arguments.folder)
    lines = [
        "| | imports | peak while loading | peak in all | limit | loading | caption | answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision in LIMITS:
        command = [sys.executable, "-m", "tools.full_size", str(arguments.folder)]
        ran = subprocess.run([*command, "--precision", precision], capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(ran.stderr + ran.stdout)
        lines.append(ran.stdout.strip().splitlines()[-1])
    text = "\n".join(["\n".join(lines), "", f"{LONGEST} new tokens each, 5 beams. {machine()}"])
    print(text)
    if arguments.write:
        replace_section(PAGE, "full size", text)


if __name__ == "__main__":
    main()
