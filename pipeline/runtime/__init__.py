"""What the ranks share at run time: collectives, logging, progress."""
