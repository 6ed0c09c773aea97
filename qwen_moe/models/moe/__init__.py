"""The mixture-of-experts block: router, experts, and how tokens get from one to the other."""
