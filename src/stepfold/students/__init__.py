"""What is trained: whole networks, LoRAs, fewer blocks; told one time or two; how students are saved and read."""
