"""The decoder's mathematics: each file reads as single-device PyTorch."""
