"""Text to tokens on disk (`python -m foxdist.data prepare`), and tokens to the batches of a training step."""
