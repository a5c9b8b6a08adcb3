"""What the cache keeps, recorded: scenarios, the file of their outcomes, and the script that makes it."""
