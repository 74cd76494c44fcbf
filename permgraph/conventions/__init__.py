"""Words and keywords that all of the package shares: how runs end and report, and how former keywords are taken."""
