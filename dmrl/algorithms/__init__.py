"""One paper, one file. Each has `Hyper`, `prepare` and `loss`, and may have `probes` and `needs`.

See docs/add_a_method.md for the contract.
"""
