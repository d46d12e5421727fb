"""What every room uses: files, folders, ranks, the terminal."""
