"""`export` as a command: students as folders, or as repositories of the Hub."""
