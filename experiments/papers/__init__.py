"""The claims of four papers about normalised networks, tested on small networks: one file per paper."""
