"""The daemon's doors: gRPC, the attach socket and HTTP."""
