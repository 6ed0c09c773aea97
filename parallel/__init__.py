"""Parallel engine: meshes, sharding and process start-up. Knows nothing of Qwen; imports torch only."""
