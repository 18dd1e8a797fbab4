"""The cluster: decisions (core), bytes (wire), the operating system (host), and what stands on them."""
