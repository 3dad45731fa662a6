"""Other daemons, as this one sees them."""
