"""Tables from the records of one or several runs: score matrix, transfer, recovery, methods, agreement, seeds."""
