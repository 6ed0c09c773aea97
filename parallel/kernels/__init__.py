"""Providers of the products inside parallel layers: plain torch, FP8 through torch, and others behind one interface."""
