"""Generated from protos/peermem/etcd by `make protos`; never edited by hand."""
