"""What all of the package shares: how runs end and report, how results show, choices among words, former names."""
