"""Speed: cases x peers, interleaved, as JSON, table and plot. `make bench`; see the tables in cases.py and peers.py."""
