"""How numbers become a mask, and what a system learns from."""
