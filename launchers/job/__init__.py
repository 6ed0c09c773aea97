"""The job while it runs: attempts until the run is done, reports of nodes and ranks, and decisions from them."""
