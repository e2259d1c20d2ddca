"""The bundled teacher, its prompts and its judge."""

from pathlib import Path

EMOJI = Path(__file__).parent / "emoji"
TEACHER = EMOJI / "pipeline"
JUDGE = EMOJI / "judge"
PROMPTS = EMOJI / "prompts.txt"
