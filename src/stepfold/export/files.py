"""Each file of an export and its use, as a table of the export's card."""

from collections.abc import Iterable
from pathlib import Path

from stepfold.students.card import CARD

README = "README.md"
FILES = "## Files"

USES = {
    README: "this card",
    CARD: "how the student was made and how it is sampled; `stepfold` reads it",
    "model_index.json": "the classes of the pipeline's parts, for `from_pretrained`",
    "scheduler": "the scheduler with which diffusers takes the student's steps",
    "transformer": "the network",
    "transformer_2": "the network for low noise levels",
    "unet": "the network",
    "vae": "the autoencoder, which decodes latents",
    "pytorch_lora_weights.safetensors": "the LoRA, for `load_lora_weights`",
    "transformer_2_lora.safetensors": "the LoRA of the network for low noise levels",
    "target_embedder.safetensors": "tells the network the time that it jumps to; `stepfold sample` reads it",
    "policy_head.safetensors": "the last layer, whose velocities are a policy's; `stepfold sample` reads it",
    "policy_scheduler": "follows the policy in diffusers",
    "adapter_model.safetensors": "the LoRA, for `PeftModel.from_pretrained`",
    "adapter_config.json": "rank, scale and layers of the LoRA, for the same",
    "model.onnx": "the network, for onnxruntime",
    "model.xml": "the network, for OpenVINO",
    "model.bin": "the network's weights, which OpenVINO reads beside it",
    "model.onnx.data": "the network's weights, which onnxruntime reads beside the graph",
}
"""Name of a file or folder -> its use."""

BEGINNINGS = {
    "text_encoder": "reads the prompt",
    "tokenizer": "cuts the prompt into tokens",
    "processor": "prepares the prompt",
}
"""Begin of the name of a pipeline's part, of which there may be several -> its use."""
OTHER_PART = "a part of the pipeline, whose class is in `model_index.json`"
OTHER_FILE = "not written by stepfold"


def listing(folder: Path) -> str:
    """The section of a folder's card about its files, those of the card itself among them."""
    names = {path.name: path.is_dir() for path in folder.iterdir()} | {README: False, CARD: False}
    return files_table((f"{name}/" if names[name] else name, use_of(name, names[name])) for name in sorted(names))


def use_of(name: str, is_folder: bool) -> str:
    """What a file or folder of that name is for."""
    known = [use for begin, use in BEGINNINGS.items() if name.startswith(begin)]
    return USES.get(name) or (known[0] if known else OTHER_PART if is_folder else OTHER_FILE)


def files_table(rows: Iterable[tuple[str, str]]) -> str:
    """The section of (name, use)."""
    table = "".join(f"| `{name}` | {use} |\n" for name, use in rows)
    return f"\n{FILES}\n\n| file | use |\n|---|---|\n{table}"
