"""What the last hidden states become: a loss, or log-probabilities of tokens; full logits never exist."""
