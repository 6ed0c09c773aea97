"""Operations with a hand-written backward or a kernel of their own; the modules that use them read as plain mathematics."""
