"""`ask`, the command line's client. It knows the daemon only over HTTP."""
