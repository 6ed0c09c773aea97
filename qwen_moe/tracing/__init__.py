"""What one training step of one rank launches, counted on fake tensors: `qwen-moe trace`."""
