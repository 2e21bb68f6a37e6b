"""The same backbone in this project's runtime and in other programs, measured in turns on one machine."""
