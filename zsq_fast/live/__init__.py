"""A run while it trains: in the terminal (`zsq-fast watch`) and for TensorBoard (`--tensorboard`)."""
