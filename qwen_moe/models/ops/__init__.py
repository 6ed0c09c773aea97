"""Operations with a hand-written backward or kernel, kept apart so that the modules that use them stay plain."""
