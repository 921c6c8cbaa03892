"""The command line: `ta-plugin`."""
