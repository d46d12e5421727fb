"""Masks of videos: region similarity J, boundary accuracy F, the rules of each benchmark, predictions and submissions."""
