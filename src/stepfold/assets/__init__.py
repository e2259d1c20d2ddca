"""The bundled teacher, a student of it, a LoRA of another style for it, its prompts and its judge."""

from pathlib import Path

EMOJI = Path(__file__).parent / "emoji"
TEACHER = EMOJI / "pipeline"
STUDENT = EMOJI / "student"
JUDGE = EMOJI / "judge"
PROMPTS = EMOJI / "prompts.txt"
STYLE = EMOJI / "style" / "pytorch_lora_weights.safetensors"
BUNDLED_LORA = "emoji-fluent"


def lora_place(source: str) -> str:
    """The file of the bundled LoRA for `emoji-fluent`, else the source itself: a file, a folder or a hub id."""
    return str(STYLE) if source == BUNDLED_LORA else source
