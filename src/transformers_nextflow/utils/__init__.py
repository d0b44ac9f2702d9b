"""What every room uses: files, locks, checks, offloading, versions of transformers."""
