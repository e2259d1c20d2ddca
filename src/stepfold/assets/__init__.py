"""The bundled teacher, a student of it, its prompts and its judge."""

from pathlib import Path

EMOJI = Path(__file__).parent / "emoji"
TEACHER = EMOJI / "pipeline"
STUDENT = EMOJI / "student"
JUDGE = EMOJI / "judge"
PROMPTS = EMOJI / "prompts.txt"
