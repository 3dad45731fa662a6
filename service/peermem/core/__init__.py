"""Pure decisions: standard library only, no clock, no files, no event loop."""
