"""What everything stands on: input errors, frozen configurations, format numbers, files."""
