"""Ways for bytes to cross between two regions."""
