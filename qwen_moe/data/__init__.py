"""Text to tokens to batches: tokenizer, corpus, preparation, blended and resumable batches."""
