"""Files of prompts, and the order in which they are used."""
