"""Other people's weights and files."""
