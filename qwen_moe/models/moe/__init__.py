"""The mixture-of-experts block: router, experts, and the dispatch of tokens to experts."""
