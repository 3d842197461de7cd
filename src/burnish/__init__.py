"""burnish fine-tunes open language models."""
