"""What all of the package shares: how runs end and report, choices among words, keywords by their former names."""
