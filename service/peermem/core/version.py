"""The project's version, as `--version`, the build info and the directory show it."""

VERSION = "0.1.0"
