"""Tasks of long-context evaluation: prompts of a wanted number of tokens, made offline from a seed."""
