"""sheepfs: volumes as files, through FUSE."""
