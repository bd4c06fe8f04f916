"""The study: the paper's programme on any data set, as one command."""
