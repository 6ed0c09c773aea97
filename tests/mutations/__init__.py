"""Mistakes that are planted one after the other, to see whether the tests notice them (`make mutations`)."""
