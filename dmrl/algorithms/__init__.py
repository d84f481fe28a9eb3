"""One paper, one file. Each has `Hyper`, `probes`, `prepare` and `loss`; see docs/design.md."""
