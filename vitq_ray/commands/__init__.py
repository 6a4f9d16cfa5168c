"""What the scripts and the console command do: the only place that parses arguments and prints."""
