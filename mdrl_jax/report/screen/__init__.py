"""What a terminal and `log.txt` show while a command works and when it ends."""
