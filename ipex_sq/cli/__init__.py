"""The command line: flags from the config classes, progress on stderr, results on stdout."""
