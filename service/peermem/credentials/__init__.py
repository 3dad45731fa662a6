"""What this daemon shows to others, and whom it believes."""
