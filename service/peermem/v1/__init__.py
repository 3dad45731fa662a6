"""Generated from protos/peermem/v1 by `make protos`; never edited by hand."""
