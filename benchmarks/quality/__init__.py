"""The quality of rounded models on real weights: this project's formats beside other programs'."""
