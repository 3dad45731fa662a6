"""Things with BAR memory, and their stand-ins."""
