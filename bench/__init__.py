"""Speed: peers on cases, timed in turns, as JSON, table and plot (`make bench`); the tables are cases, jobs and peers."""
