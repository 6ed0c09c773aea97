"""Parallel engine: meshes, sharding and process start-up. It knows nothing of Qwen and imports torch only."""
