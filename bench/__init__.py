"""Speed: peers on cases, timed in turns, as JSON, table and plot (`make bench`). Tables: cases, jobs, peers, nets."""
